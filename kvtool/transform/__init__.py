"""What transform is made of; methods/transform.py is the method itself.

``code`` is the chain of stages; ``fit`` finds bases and decoders; ``waterfill`` spends bits over heads and layers.
"""
