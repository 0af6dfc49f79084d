"""The colours of a report, in light and in dark, as CSS.

Levels and sensitivities are ramps of one hue that differ in lightness, so that they can be told apart without colour
vision. The series of charts use the colours of Okabe and Ito (Color Universal Design, 2008), darkened or lightened until
their contrast with the page is 3 to 1 (WCAG 2.2), and also differ in their marks.
"""

from __future__ import annotations

#: Sixteenths, so that levels such as 1:8 and 1:16 look different.
LEVEL_STEPS = 16
SENSITIVITY_STEPS = 8

#: By theme: colours of page, text (ink), secondary text, rules, and the faint ground of table heads.
PAGE = {
    "light": {
        "page": "#ffffff",
        "ink": "#1b1f24",
        "muted": "#57606a",
        "rule": "#d0d7de",
        "ground": "#f6f8fa",
    },
    "dark": {"page": "#14171b", "ink": "#e4e8ec", "muted": "#9aa5b1", "rule": "#363d46", "ground": "#1d2228"},
}
#: By theme: the colours that a ramp passes through, from the lowest to the highest value.
LEVELS = {
    "light": ("#f2f6fa", "#b5d2e8", "#4a90c4", "#0b4f8a", "#06274a"),
    "dark": ("#1b242d", "#1d4262", "#2a73a8", "#6fb2e0", "#cfe6f7"),
}
SENSITIVITIES = {
    "light": ("#fdf5ec", "#f8cf9f", "#e08a34", "#97500f", "#4d2604"),
    "dark": ("#241e17", "#57391a", "#a2651f", "#e8a35a", "#fbe3c6"),
}
SERIES = {
    "light": ("#0072b2", "#c84f00", "#00805c", "#a83c7d", "#8a6a00", "#3c7fa6", "#882255", "#5f5f5f"),
    "dark": ("#56b4e9", "#f28b4b", "#35c59a", "#e08fbf", "#d8b53c", "#9ccbe6", "#e58aa5", "#b5b5b5"),
}
#: Marks of the series in matplotlib's letters, and the same as text.
MARKS = (("o", "●"), ("s", "■"), ("^", "▲"), ("D", "◆"), ("v", "▼"), ("P", "✚"), ("*", "★"))
#: The mark of series in the colour of text.
INK_MARK = ("X", "✖")


def rgb(color: str) -> tuple[int, int, int]:
    """Return the three bytes of ``#rrggbb``."""
    red, green, blue = bytes.fromhex(color[1:])
    return red, green, blue


def luminance(color: str) -> float:
    """Return the relative luminance in [0, 1] (WCAG 2.2)."""
    linear = [c / 12.92 if (c := v / 255) <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for v in rgb(color)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    """Return the contrast of two colours in [1, 21] (WCAG 2.2)."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def ramp(anchors: tuple[str, ...], steps: int) -> list[str]:
    """Return ``steps + 1`` colours that pass through the anchors at equal distances."""
    colors = []
    for step in range(steps + 1):
        at, part = divmod(step * (len(anchors) - 1), steps)
        first, second = anchors[at], anchors[min(at + 1, len(anchors) - 1)]
        mixed = (round(a + (b - a) * part / steps) for a, b in zip(rgb(first), rgb(second), strict=True))
        colors.append("#" + bytes(mixed).hex())
    return colors


def ink_on(color: str) -> str:
    """Return black or white, whichever is easier to read on a colour."""
    return max(("#000000", "#ffffff"), key=lambda ink: contrast(ink, color))


def theme_css(theme: str) -> str:
    """Return a theme's CSS: custom properties, and classes ``l0``.. for levels and ``v0``.. for sensitivities."""
    properties = [f"--{name}:{color}" for name, color in PAGE[theme].items()]
    properties += [f"--c{i}:{color}" for i, color in enumerate(SERIES[theme])]
    rules = [f":root{{color-scheme:{theme};{';'.join(properties)}}}"]
    for letter, anchors, steps in (
        ("l", LEVELS[theme], LEVEL_STEPS),
        ("v", SENSITIVITIES[theme], SENSITIVITY_STEPS),
    ):
        for i, color in enumerate(ramp(anchors, steps)):
            rules.append(f".{letter}{i}{{background:{color};color:{ink_on(color)}}}")
    return "\n".join(rules)


def css() -> str:
    """Return the CSS of both themes: light by default, dark for readers who prefer it."""
    return (
        f"{theme_css('light')}\n@media screen and (prefers-color-scheme: dark){{\n{theme_css('dark')}\n}}\n"
    )
