"""How the page looks: one style sheet, for screens of any width, light or dark, and for paper.

Colours tell nothing that words, marks or place do not tell as well. The scale of the maps is
viridis, whose lightness grows evenly for every kind of colour vision (van der Walt, Smith; 2015).
"""

from __future__ import annotations

# Its darkest tenth is left out, so that it stands out from a dark page.
SCALE = (
    "#482475", "#414487", "#355f8d", "#2a788e", "#21918c", "#22a884", "#44bf70", "#7ad151",
    "#bddf26",
)  # fmt: skip

STYLE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --dim: #59636e; --line: #d1d9e0;
  --soft: #f3f5f7; --blank: #e4e8ec; --zero: #aab2ba; --error: #a3260b; --warning: #7a5200;
  --note: #1b5e97; --bad: #d55e00; --curve: #0b5cad; --band: #0b5cad33; --accent: #0b5cad;
  --gutter: 11rem; }
@media screen and (prefers-color-scheme: dark) { :root { --page: #12161b; --ink: #e4e8ec;
  --dim: #9aa4af; --line: #39424d; --soft: #1b2128; --blank: #2b323a; --zero: #7d8894;
  --error: #ff8f73; --warning: #f0b429; --note: #7cc0f5; --bad: #ff7a1a; --curve: #6db3f2;
  --band: #6db3f240; --accent: #7cc0f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.2rem 1.2rem 3rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.45rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; font-weight: 600; margin: 0 0 .4rem; overflow-wrap: anywhere; }
p { margin: .3rem 0; } small, .dim { color: var(--dim); font-weight: 400; font-size: .86em; }
a { color: var(--accent); }
code, pre, table { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .8rem 0; }
dl { display: grid; grid-template-columns: 5.5rem minmax(0, 1fr); gap: .2rem .8rem; margin: 0; }
dt { color: var(--dim); } dd { margin: 0; overflow-wrap: anywhere; white-space: pre-wrap; }
.verdict { font-weight: 600; }
.error { --tone: var(--error); } .warning { --tone: var(--warning); } .note { --tone: var(--note); }
.severity { color: var(--tone); }
.finding { border: 1px solid var(--line); border-left: 5px solid var(--tone); border-radius: 4px;
  padding: .7rem .9rem; margin: .8rem 0; }
.finding .number { color: var(--page); background: var(--tone); border-radius: 3px;
  padding: 0 .45em; margin-right: .4em; }
.finding:target { outline: 3px solid var(--accent); }
details.finding { padding: .35rem .9rem; } details.finding > dl { margin-top: .4rem; }
summary { cursor: pointer; overflow-wrap: anywhere; }
pre { margin: .25rem 0; padding: .4rem .6rem; background: var(--soft); border-radius: 4px;
  font-size: .87em; line-height: 1.45; white-space: pre-wrap; overflow-wrap: anywhere; }
pre b { display: block; } pre span { display: block; color: var(--dim); }
dd ol { margin: 0; padding-left: 1.4rem; white-space: normal; }
dd p { margin: 0; }
.profile { display: grid; grid-template-columns: minmax(0, auto) auto minmax(4rem, 1fr);
  gap: 0 .8rem; font-size: .9em; white-space: normal; }
.profile .bar { align-self: center; height: .7em; background: var(--curve); min-width: 2px; }
.profile .wide { grid-column: 1 / -1; }
.right { text-align: right; }
figure { margin: 0 0 1rem; } figcaption { margin-bottom: .2rem; font-weight: 600; }
.axes { display: grid; grid-template-columns: var(--gutter) minmax(0, 1fr); }
svg { display: block; width: 100%; }
.curve svg { height: 150px; border: 1px solid var(--line); }
.ticks { position: relative; font-size: .75rem; color: var(--dim); }
.ticks span { position: absolute; right: .5rem; transform: translateY(-50%); white-space: nowrap; }
.steps { position: relative; height: 1.3rem; font-size: .75rem; color: var(--dim); }
.steps span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.steps span:first-child { transform: none; left: 0; }
.steps span:last-child { transform: none; right: 0; }
.marks { position: relative; }
.marks a { position: absolute; transform: translateX(-50%); min-width: 1.3rem; text-align: center;
  font-size: .75rem; line-height: 1.2rem; border-radius: 3px; padding: 0 .25rem;
  background: var(--tone); color: var(--page); text-decoration: none; }
.curve path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.curve .line { stroke: var(--curve); stroke-width: 1.8; }
.curve .band { fill: var(--band); }
.curve .grid { stroke: var(--line); stroke-width: 1; }
.curve .at { stroke: var(--tone); stroke-width: 1; stroke-dasharray: 3 3; }
.curve .dots { stroke: var(--curve); stroke-width: 5; stroke-linecap: round; }
.curve .bad { stroke: var(--bad); stroke-width: 9; stroke-linecap: round; }
.curve .hole { stroke: var(--page); stroke-width: 3; stroke-linecap: round; }
.over rect { fill: transparent; } .over rect:hover { fill: var(--ink); fill-opacity: .09; }
.map { margin-bottom: .6rem; } .map > summary { font-weight: 600; }
.map .labels { font-size: min(calc(var(--row) * .8), .8rem); line-height: var(--row);
  overflow: hidden; padding-right: .5rem; }
.map .labels span { display: block; height: var(--row); overflow: hidden; white-space: pre;
  text-overflow: ellipsis; }
.map .labels span.broken { color: var(--bad); font-weight: 600; }
.map svg { height: calc(var(--row) * var(--rows)); background: var(--blank); }
.map path { fill: none; stroke-width: 1; shape-rendering: crispEdges; }
.map .zero { stroke: var(--zero); } .map .bad { stroke: #d55e00; }
.map .thin { stroke: #fff; stroke-width: 2; vector-effect: non-scaling-stroke; }
.map .spot { stroke: #fff; stroke-width: 11; stroke-linecap: round; shape-rendering: auto;
  vector-effect: non-scaling-stroke; }
.map .spot.in { stroke: #000; stroke-width: 7; }
.legend { display: flex; flex-wrap: wrap; align-items: center; gap: .2rem .9rem; font-size: .8rem;
  color: var(--dim); margin: .2rem 0 .4rem; }
.legend i { display: inline-block; width: 1.3rem; height: .8rem; vertical-align: -1px; }
.legend .key { margin-right: .35rem; } .legend .zero { background: var(--zero); }
.legend .blank { background: var(--blank); }
.legend .bad { background: linear-gradient(#d55e00 40%, #fff 40% 60%, #d55e00 60%); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .8rem; }
th, td { padding: .12rem .6rem; text-align: right; white-space: nowrap; }
th { color: var(--dim); font-weight: 600; border-bottom: 1px solid var(--line); }
.left { text-align: left; }
tr.flagged td:first-child, tr.flagged td:last-child { color: var(--error);
  font-weight: 600; }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--page);
  min-width: 7rem; max-width: 26rem; white-space: pre-wrap; overflow-wrap: anywhere;
  text-align: left; }
tbody tr:nth-child(even) td { background: var(--soft); }
footer { margin-top: 2.5rem; color: var(--dim); font-size: .86em; }
@media (max-width: 40rem) { :root { --gutter: 6.2rem; } body { padding: .8rem .8rem 2rem; }
  dl { grid-template-columns: 4.2rem minmax(0, 1fr); gap: .2rem .4rem; }
  .finding dl { grid-template-columns: minmax(0, 1fr); gap: 0; }
  .finding dd { margin-bottom: .4rem; }
  .legend i { width: .9rem; }
  .finding { padding: .6rem .6rem; } .curve svg { height: 120px; }
  td:first-child, th:first-child { max-width: 9.5rem; } .roomy { display: none; } }
@media print { :root { color-scheme: light; } body { max-width: none; padding: 0; font-size: 11px; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  .finding, figure, tr { break-inside: avoid; } nav { display: none; }
  details::details-content { content-visibility: visible; display: block; block-size: auto; }
  .scroll { overflow: visible; } a { color: inherit; text-decoration: none; } }
"""
