"""Weights decoded for a block's second run are not kept by plain PyTorch."""


def keep_decoded(keeping: bool, forget: bool) -> None:
    """Do nothing."""
