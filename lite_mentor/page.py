"""The frame of report.html: its markup, its style in light and dark, and the escaping of untrusted text."""

from __future__ import annotations

import html
import unicodedata


def render(**parts: str) -> str:
    """The page. `title`, `date`: escaped text; `summary`, `body`, `settings`: markup."""
    return _PAGE.format(style=_STYLE, **parts)


def escape(text: str) -> str:
    """Untrusted text, made safe for HTML; what would be invisible or would reorder its neighbours becomes visible."""
    plain = text.encode("utf-8", "replace").decode("utf-8")
    visible = (f"\\x{ord(c):02x}" if unicodedata.category(c) in ("Cc", "Cf") and c not in "\n\t" else c for c in plain)
    return html.escape("".join(visible))


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title><style>{style}</style></head><body><main>
<header><h1>{title}</h1><p class="note">{date}</p></header>
<section class="summary">{summary}</section>
{body}
<h2>Settings</h2><details><summary>Every field of config.json</summary><dl>{settings}</dl></details>
</main></body></html>
"""

_STYLE = """
:root { color-scheme: light dark; --page: #f7f7f5; --card: #fff; --ink: #1d1f23; --muted: #6a6f78; --line: #e3e4e0;
  --tint: #e8f1ec; --tint-ink: #1f5c40; --c0: #2f6fde; --c1: #d9822b; --c2: #2e9d69; --c3: #c2408f; --c4: #7a5bd0;
  --c5: #c23b3b; --c6: #11939e; --c7: #8a7a3a; }
@media (prefers-color-scheme: dark) { :root { --page: #15171a; --card: #1d2024; --ink: #e6e7e9; --muted: #969ca6;
  --line: #32363c; --tint: #1c3229; --tint-ink: #8fd6b2; --c0: #78a6ff; --c1: #f0a458; --c2: #5fcf9a; --c3: #ec7fc0;
  --c4: #ab92f5; --c5: #f07a7a; --c6: #4cc4cf; --c7: #c9b667; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 36px 24px 72px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; letter-spacing: -.01em; }
h2 { font-size: 19px; margin: 40px 0 12px; }
header p { margin: 4px 0 20px; }
.note, small { color: var(--muted); font-size: 12.5px; }
.summary, figure, .wide, details { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.summary { padding: 18px 22px; }
.lead { margin: 0 0 8px; font-size: 16px; }
.findings { margin: 0; padding-left: 20px; }

.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 9px 14px; vertical-align: top; white-space: nowrap; }
tbody th, tbody td { border-top: 1px solid var(--line); }
thead th { color: var(--muted); font-size: 13px; font-weight: 500; }
tbody th { font-weight: 500; }
td i { color: var(--muted); font-style: normal; }

.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(420px, 100%), 1fr)); gap: 16px; }
figure { margin: 0; padding: 14px 14px 6px; min-width: 0; }
figcaption { display: flex; flex-wrap: wrap; gap: 2px 14px; align-items: baseline; margin-bottom: 6px;
  font-size: 12.5px; color: var(--muted); }
figcaption b { color: var(--ink); font-size: 14px; font-weight: 600; }
figcaption i { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 5px; }
svg { display: block; width: 100%; }
svg text { fill: var(--muted); font: 11px system-ui, sans-serif; }
.grid { stroke: var(--line); }
.line, .raw, .mark { fill: none; stroke: var(--c); stroke-width: 2; stroke-linecap: round; stroke-linejoin: round; }
.raw { opacity: .28; stroke-width: 1.2; }
.bar { fill: var(--c); }
.hit { fill: transparent; }
.hit:hover { fill: var(--ink); fill-opacity: .06; }
.interval { height: 12px; width: 100%; min-width: 110px; margin-top: 4px; }
.interval * { vector-effect: non-scaling-stroke; }
.interval .line { opacity: .4; stroke-width: 4; stroke-linecap: butt; }
.interval .mark { stroke-width: 3; stroke-linecap: butt; }

details { margin-bottom: 12px; padding: 0 18px; }
summary { cursor: pointer; padding: 11px 0; }
.chip { display: inline-block; margin-left: 7px; padding: 0 9px; border: 1px solid var(--line); border-radius: 99px;
  font-size: 12.5px; color: var(--muted); }
.chip b { color: var(--ink); font-weight: 600; }
.question { margin: 4px 0; white-space: pre-wrap; overflow-wrap: anywhere; }
details .note { margin: 4px 0; }
pre { max-height: 520px; overflow-y: auto; margin: 10px 0 16px; padding-top: 10px; border-top: 1px solid var(--line);
  white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.55 ui-monospace, Menlo, Consolas, monospace; }
.own { color: var(--ink); }
.injected { color: var(--tint-ink); background: var(--tint); border-radius: 3px; padding: 1px 3px; }
dl { display: grid; grid-template-columns: max-content 1fr max-content 1fr; gap: 3px 28px; margin: 4px 0 18px;
  font-size: 13px; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; font-family: ui-monospace, Menlo, Consolas, monospace; }
@media (max-width: 700px) { dl { grid-template-columns: max-content 1fr; } main { padding: 20px 14px 48px; } }
""" + "".join(
    f".c{i} {{ --c: var(--c{i}); }} .f{i} {{ --c: var(--c{i}); background: var(--c{i}); }}\n" for i in range(8)
)
