"""Words for what is counted."""


def counted(number: int, thing: str) -> str:
    """ "1 pair", "2 pairs"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"
