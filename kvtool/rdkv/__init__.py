"""What rdkv is made of; methods/rdkv.py is the method itself.

``budget`` turns every unit of a budget into one; ``fit`` measures distortions and turns them into levels; ``layers``
spreads one budget over all layers; ``pages`` is the packed form.
"""
