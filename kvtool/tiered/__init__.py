"""What tiered is made of; methods/tiered.py is the method itself.

``places`` says which tier a block belongs to; ``pools`` how the blocks of a tier are stored.
"""
