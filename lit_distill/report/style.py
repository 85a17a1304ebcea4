"""The page's style sheet: light and dark, wide and narrow, on paper too."""

from __future__ import annotations

# Colours of lines stand at least 3:1 against the ground and differ in lightness; text stands at 4.5:1 or more.
LIGHT = {
    "ground": "#ffffff",
    "raised": "#f6f7f9",
    "text": "#1b1f24",
    "muted": "#57606a",
    "rule": "#d5dae0",
    "best": "#0b6b3a",
    "link": "#0b5cad",
    "s0": "#c2540a",
    "s1": "#12407f",
    "s2": "#168f7f",
    "s3": "#8b3fc6",
    "s4": "#7a6a00",
    "s5": "#b3245c",
    "s6": "#5f6b76",
}
DARK = {
    "ground": "#14171b",
    "raised": "#1d2127",
    "text": "#e8eaed",
    "muted": "#a8b0ba",
    "rule": "#3a414a",
    "best": "#7fdca4",
    "link": "#8ebcf5",
    "s0": "#f5a35c",
    "s1": "#5a9df0",
    "s2": "#7deedb",
    "s3": "#a478e8",
    "s4": "#e3d36b",
    "s5": "#ff8fb3",
    "s6": "#aab4bf",
}

RULES = """
* { box-sizing: border-box }
body { margin: 0; background: var(--ground); color: var(--text); font: 16px/1.5 system-ui, sans-serif }
main, header, footer { max-width: 1180px; margin: 0 auto; padding: 0 24px }
header { padding-top: 28px }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px }
h2 { font-size: 1.25rem; margin: 44px 0 8px; padding-top: 12px; border-top: 1px solid var(--rule) }
h3 { font-size: 1rem; margin: 24px 0 6px }
p { margin: 6px 0; max-width: 78ch }
a { color: var(--link) }
.muted, figcaption small, .note { color: var(--muted); font-size: .875rem }
h1, h2, h3, p, li, dd, code, figcaption, h4 { overflow-wrap: anywhere }
code { font: .875em/1.5 ui-monospace, monospace }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 18px; padding: 0; margin: 14px 0 0 }
nav a { display: inline-block; padding: 3px 0 }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 14px 0 }
dl.facts dt { color: var(--muted) }
dl.facts dd { margin: 0 }
.warning { border-left: 4px solid var(--s0); background: var(--raised); padding: 8px 14px; margin: 14px 0 }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: 6px; margin: 10px 0 }
table { border-collapse: collapse; width: 100%; font-size: .9375rem }
caption { text-align: left; padding: 0 }
th, td { padding: 5px 14px; text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums }
thead th { vertical-align: bottom; border-bottom: 2px solid var(--rule); white-space: normal; min-width: 7rem; max-width: 13rem }
thead small { display: block; font-weight: 400; color: var(--muted) }
thead th:first-child, tbody th { text-align: left }
tbody th { font-weight: 400 }
tbody tr:not(.group) th:first-child, thead th:first-child { position: sticky; left: 0; background: var(--ground) }
tbody tr.group > * { padding-top: 14px; border-bottom: 1px solid var(--rule) }
tbody tr.group th { font-weight: 600 }
tbody tr.group span { position: sticky; left: 14px }
tbody tr:not(.group):hover > * { background: var(--raised) }
td.best { color: var(--best); font-weight: 700 }
td .star { display: inline-block; width: 1.3em; text-align: right }
td .unit, th .unit { color: var(--muted) }
table.words th { text-align: left }
table.words td { text-align: left; white-space: normal; min-width: 12ch; overflow-wrap: anywhere }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: 22px 32px; margin: 14px 0;
  align-items: end }
.charts.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)) }
figure { margin: 0; min-width: 0; max-width: 440px; break-inside: avoid }
.small figure { max-width: 330px }
figcaption { font-weight: 600; font-size: .9375rem; margin-bottom: 6px }
figcaption small { display: block; font-weight: 400 }
figure svg { display: block; width: 100%; height: auto }
ul.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 4px 22px; padding: 0; margin: 10px 0; font-size: .9375rem }
ul.legend li { display: flex; align-items: center }
ul.legend svg { width: 34px; height: 14px; margin-right: 8px; display: block }
svg text { font: 12px system-ui, sans-serif; fill: var(--muted) }
svg text.head { font-weight: 600; fill: var(--text) }
svg text.value { fill: var(--text); font-variant-numeric: tabular-nums }
svg path { fill: none }
.grid { stroke: var(--rule); stroke-width: .7 }
.axis { stroke: var(--muted); stroke-width: 1 }
.diagonal { stroke: var(--muted); stroke-width: 1.2 }
.gap { stroke: var(--text); stroke-width: 1 }
.line { stroke-width: 2; stroke-linejoin: round }
.mark { stroke: var(--ground); stroke-width: .8 }
.track { fill: var(--raised) }
.count { fill: var(--muted) }
svg .band { stroke: none; opacity: .18 }
.fill.soft { opacity: .38 }
article { border: 1px solid var(--rule); border-radius: 6px; margin: 14px 0; padding: 10px 16px 14px; break-inside: avoid }
article h3 { margin: 4px 0 8px; font-size: .875rem; font-weight: 400; color: var(--muted) }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr)); gap: 12px 22px }
.answers > div { min-width: 0 }
.answers h4 { margin: 0 0 2px; font-size: .8125rem; color: var(--muted); font-weight: 600 }
.said { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; font: .875rem/1.5 ui-monospace, monospace;
  max-height: 22em; overflow-y: auto }
.prompt { border-bottom: 1px solid var(--rule); padding-bottom: 10px; margin-bottom: 10px }
.empty { color: var(--muted); font-style: italic }
pre { overflow-x: auto; background: var(--raised); padding: 10px 14px; border-radius: 6px; font-size: .8125rem }
footer { padding: 24px; color: var(--muted); font-size: .875rem }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap }
@media (max-width: 600px) {
  main, header, footer { padding-left: 14px; padding-right: 14px }
  h1 { font-size: 1.4rem }
  th, td { padding: 5px 9px }
  table { font-size: .875rem }
  thead th { min-width: 5.5rem; max-width: 9rem }
  tbody tr:not(.group) th { white-space: normal; min-width: 7rem; max-width: 8.5rem }
  tbody tr.group span { left: 9px }
  dl.facts { grid-template-columns: 1fr; gap: 0 }
  dl.facts dd { margin-bottom: 6px }
}
@page { margin: 10mm }
@media print {
  body { font-size: 11pt }
  nav { display: none }
  .scroll, .said { overflow: visible; max-height: none }
  h2, h3, .note, .legend { break-after: avoid }
  table { font-size: .8125rem }
  th, td { padding: 3px 8px }
  a { color: inherit; text-decoration: none }
}
"""


def style_sheet() -> str:
    """Everything between the style tags."""
    styles = "".join(
        f".line.s{n} {{ stroke: var(--s{n}) }} .fill.s{n}, .mark.s{n}, svg .band.s{n} {{ fill: var(--s{n}) }}\n"
        for n in range(7)
    )
    dark = f"@media screen and (prefers-color-scheme: dark) {{ {_variables(DARK)} }}"
    return f"{_variables(LIGHT)}\n{dark}\n:root {{ color-scheme: light dark }}\n{RULES}{styles}"


def _variables(colours: dict[str, str]) -> str:
    return f":root {{ {'; '.join(f'--{name}: {colour}' for name, colour in colours.items())} }}"
