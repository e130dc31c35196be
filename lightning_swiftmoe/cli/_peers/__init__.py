"""``swiftmoe bench step peers=[...]``: the same model under several systems, each in processes of its own.

``driver`` starts ``worker`` once a rank; the worker's peer trains, and a ``Meter`` measures.
"""
