"""Classes by their names, where importing them is slow or they are no dependencies."""


def is_a(thing: object, *names: str) -> bool:
    """Return whether the class of a thing, or one that it derives from, has one of some names."""
    return any(base.__name__ in names for base in type(thing).__mro__)
