"""What rina is made of; methods/rina.py is the method itself.

``code`` is the codec of recursive one-bit stages; ``fit`` finds feedback, correction and the map of values; ``placed``
puts stages where their noise does most damage; ``tiles`` is the pursuit as published.
"""
