"""The look of the report: one style sheet, light or dark as the reader's system is."""

STYLE = """
:root { color-scheme: light dark;
  --ground: #f7f7f5; --card: #ffffff; --ink: #1b1e23; --quiet: #626973; --line: #e3e4e1; --grid: #ececea;
  --control: #0b66c3; --without: #8a8f98; --ceiling: #b36b00; --wash: #eef1f4; }
@media (prefers-color-scheme: dark) { :root {
  --ground: #131519; --card: #1b1e24; --ink: #e9eaec; --quiet: #9aa2ad; --line: #2d3138; --grid: #272b31;
  --control: #62aaf5; --without: #8b929c; --ceiling: #eba53c; --wash: #23272e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 48px 24px 72px; }
.title { color: var(--quiet); font-size: 15px; font-weight: 500; margin: 0 0 10px; overflow-wrap: anywhere; }
h1 { font-size: clamp(24px, 4vw, 36px); line-height: 1.22; letter-spacing: -.015em; font-weight: 650;
  margin: 0 0 14px; text-wrap: balance; }
h2 { font-size: 20px; letter-spacing: -.01em; margin: 48px 0 6px; }
p { margin: 0 0 14px; max-width: 60em; }
.quiet, small { color: var(--quiet); font-size: 14px; line-height: 1.5; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 20px 24px;
  margin: 20px 0; }
.plot { display: block; overflow: visible; }
.plot text { font-size: 14px; fill: var(--quiet); }
.plot .label, .plot .value { font-size: 15px; font-weight: 600; fill: var(--ink); }
.plot .value { font-variant-numeric: tabular-nums; }
.plot .grid { stroke: var(--grid); } .plot .track { stroke: var(--line); }
.plot .pair { opacity: .22; } .plot .mean { stroke: var(--card); stroke-width: 2; }
.plot .bar { stroke-width: 2.5; }
.control { fill: var(--control); stroke: var(--control); } .without { fill: var(--without); stroke: var(--without); }
.ceiling { fill: var(--ceiling); stroke: var(--ceiling); } .plot text, .plot .pair { stroke: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 15px; }
th, td { text-align: left; padding: 9px 20px 9px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 500; color: var(--quiet); } tbody th { color: var(--ink); white-space: nowrap; }
tr:last-child > * { border-bottom: 0; } th:last-child, td:last-child { padding-right: 0; }
.figures small { font-size: inherit; }
.figures td, .figures thead th + th { font-variant-numeric: tabular-nums; white-space: nowrap; text-align: right; }
.facts td { overflow-wrap: anywhere; } .facts th { width: 30%; color: var(--quiet); white-space: normal; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 20px; padding: 0; margin: 12px 0 0; list-style: none;
  font-size: 14px; color: var(--quiet); }
.legend i { display: inline-block; width: 14px; height: 14px; border-radius: 4px; border: 1px solid #80808080;
  vertical-align: -2px; margin-right: 7px; }
article h3 { font-size: 16px; margin: 0; overflow-wrap: anywhere; }
article header { display: flex; flex-wrap: wrap; gap: 2px 20px; justify-content: space-between; align-items: baseline;
  margin-bottom: 14px; }
.pictures { display: grid; grid-template-columns: repeat(var(--columns), 1fr); gap: 16px 14px; }
figure { margin: 0; } figcaption { font-size: 13px; line-height: 1.35; color: var(--quiet); margin-top: 6px; }
figcaption b { color: var(--ink); font-weight: 600; display: block; }
figure img { display: block; width: 100%; height: auto; border-radius: 8px; background: var(--wash);
  box-shadow: 0 0 0 1px var(--line); }
@media (max-width: 560px) {
  main { padding: 28px 16px 48px; } .card { padding: 16px; margin: 16px 0; }
  .pictures { grid-template-columns: repeat(2, 1fr); } th, td { padding-right: 10px; }
  table { font-size: 14px; } .figures tbody th { white-space: normal; }
  .figures small { display: block; font-size: 12px; } }
@media print { body { background: #fff; } .card { break-inside: avoid; } }
"""
