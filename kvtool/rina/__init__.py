"""What rina is made of; methods/rina.py is the method itself.

``code`` is the codec of recursive one-bit stages; ``fit`` finds feedback and correction; ``plan`` turns a target in
bits into stages; ``tiles`` is the pursuit as published.
"""
