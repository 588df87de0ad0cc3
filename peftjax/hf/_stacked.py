"""Layers that an adapter treats differently, in a model that has them as one stack."""


class LayersDifferError(ValueError):
    """What an adapter asks of one layer of a stack and not of another: it needs them unrolled.

    Args:
      what: the leaf, and how its layers differ.

    Example:
      >>> print(LayersDifferError("'layers/kernel' would have ranks [4, 8]"))
      'layers/kernel' would have ranks [4, 8]. Load the model with its layers unrolled
      (scan_layers=False)
    """

    def __init__(self, what: str):
        super().__init__(f'{what}. Load the model with its layers unrolled (scan_layers=False)')
