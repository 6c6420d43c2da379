"""The colours in which a hint names classes. One palette, fixed: a control knows only those it was trained with."""

Colour = tuple[int, int, int]

# Class -> RGB, in the order of the label indices 0 to 3. The corners of the colour cube that lie farthest apart: any
# two differ by 255 in two channels, so that neither resizing nor JPEG turns one into another.
SEGMENTATION: dict[str, Colour] = {
    "wall": (0, 0, 255),
    "floor": (0, 255, 0),
    "thing": (255, 0, 0),
    "second thing": (255, 255, 255),
}
