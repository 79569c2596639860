"""The page's frame and its style sheet."""

from __future__ import annotations

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
STYLE = """
:root { --paper: #f5f6f8; --card: #fff; --ink: #1c2430; --muted: #667080; --line: #e3e6ea; --normal: #2f6fb5;
  --anomalous: #d9572b; --warn: #fff3dc; --warn-line: #e0a030; --load: #9aa5b1; --compile: #8a6fc0; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171c; --card: #1d2128; --ink: #e8ebf0; --muted: #9aa4b2;
  --line: #323843; --normal: #6aa9ee; --anomalous: #ff8a5c; --warn: #3a2f17; --warn-line: #c08a2a; --load: #7c8794;
  --compile: #a993dd; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, "Noto Sans", "Liberation Sans", sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1240px; margin: 0 auto; padding: 20px 16px 48px; }
header { padding: 4px 4px 12px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0; overflow-wrap: anywhere; } h1 span { font-weight: 400; }
h2 { font-size: 18px; margin: 0 0 12px; } h3 { font-size: 15px; margin: 20px 0 8px; }
h3 small, .hint, .facts { color: var(--muted); font-size: 13px; font-weight: 400; }
p { margin: 0 0 8px; } header .hint { margin: 6px 0 0; overflow-wrap: anywhere; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px;
  margin: 0 0 14px; }
.lead { font-size: 20px; line-height: 1.35; margin: 0 0 16px; }
.stats { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 190px), 1fr)); gap: 14px 22px; }
.stat h3::first-letter { text-transform: uppercase; }
.stat h3 { margin: 0; font-weight: 500; color: var(--muted); font-size: 14px; }
.value { font-size: 34px; line-height: 1.15; font-weight: 600; margin: 0 0 4px; } .value small { font-size: 20px; }
.meter { display: block; height: 5px; border-radius: 3px; background: var(--line); margin: 0 0 6px; overflow: hidden; }
.meter i { display: block; height: 100%; background: var(--normal); } .meter.bad i { background: var(--anomalous); }
.threshold { margin: 14px 0 6px; padding-top: 12px; border-top: 1px solid var(--line); overflow-wrap: anywhere; }
.alert { background: var(--warn); border-left: 4px solid var(--warn-line); padding: 10px 14px; border-radius: 4px; }
ul { margin: 0; padding-left: 20px; overflow-wrap: anywhere; } li { margin: 2px 0; }
summary { cursor: pointer; color: var(--muted); } section > details > summary { font-size: 16px; color: var(--ink); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 14px 24px; }
.plots.small { grid-template-columns: repeat(auto-fill, minmax(min(100%, 270px), 1fr)); }
.plot svg { display: block; width: 100%; height: auto; max-width: 480px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; color: var(--muted); font-weight: 500; } th, td { padding: 6px 14px 6px 0; vertical-align: top; }
tr + tr td, thead + tbody tr td { border-top: 1px solid var(--line); }
details .scroll { margin-top: 8px; } details td { overflow-wrap: anywhere; min-width: 90px; }
.split { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 380px), 1fr)); gap: 20px 32px; }
.split > * { min-width: 0; } .flagged { display: block; min-width: 96px; } .flagged .meter { margin: 3px 0 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr)); gap: 14px; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: 10px; min-width: 0; }
.file { margin: 0; font-size: 13px; overflow-wrap: anywhere; } .facts { margin: 0 0 8px; overflow-wrap: anywhere; }
.facts b { color: var(--ink); font-weight: 600; }
.panels { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: 6px; }
figure { margin: 0; } figure img { display: block; width: 100%; height: auto; border-radius: 4px; }
figcaption { color: var(--muted); font-size: 12px; text-align: center; }
.scale { display: flex; align-items: center; gap: 10px; font-size: 13px; color: var(--muted); margin: 0 0 4px; }
.scale i { flex: 1; max-width: 260px; height: 10px; border-radius: 5px; }
.times { display: flex; height: 16px; border-radius: 5px; overflow: hidden; gap: 2px; margin: 0 0 10px; }
.load { background: var(--load); } .compile { background: var(--compile); } .train { background: var(--normal); }
.score { background: var(--anomalous); }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 8px; }
@media (max-width: 560px) { main { padding: 12px 8px 32px; } section { padding: 14px 12px; } .lead { font-size: 17px; }
  h1 { font-size: 22px; } .panels { grid-auto-flow: row; grid-template-columns: 1fr 1fr; }
  .stats { grid-template-columns: 1fr 1fr; gap: 16px; } .value { font-size: 28px; } h3 small { display: block; } }
"""
