"""The page's style sheet: light and dark, phone and paper."""

STYLE = """
:root { color-scheme: light dark; --back: #fff; --card: #f5f6f8; --ink: #1a1d21; --soft: #5b636d;
  --rule: #d8dce1; --good: #117a41; --middling: #8a5a00; --bad: #b3261e; --unknown: #4b5563;
  --c0: #0b62c4; --c1: #c2410c; --c2: #0f766e; --c3: #a21caf; --c4: #8a6d00; --c5: #64748b;
  --c6: #4d7c0f; --c7: #9f1239; }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --card: #1e2329; --ink: #e8eaed;
  --soft: #a3abb5; --rule: #3a414a; --good: #5fd394; --middling: #f0b64d; --bad: #ff8a80;
  --unknown: #b8c0ca; --c0: #6cb2ff; --c1: #ff9a5c; --c2: #4fd1c5; --c3: #e49bf2; --c4: #e5c24a;
  --c5: #9fb0c4; --c6: #a3d85c; --c7: #ff8fab; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 68rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Open Sans", sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.3rem; margin: 0 0 .2rem; } h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0 0 .4rem; } p { margin: .3rem 0 .6rem; }
header p, .absent, .id, figcaption, footer, nav { color: var(--soft); font-size: .9rem; }
nav a { color: inherit; margin-right: .8rem; }
.verdict { border: 1px solid var(--rule);
  border-left: .5rem solid var(--tone); border-radius: .4rem;
  padding: 1rem; margin: 1rem 0; background: var(--card); }
.verdict h2 { margin: 0 0 .4rem; font-size: 1.5rem; line-height: 1.25; color: var(--tone); }
.good { --tone: var(--good); } .middling { --tone: var(--middling); } .bad { --tone: var(--bad); }
.unknown { --tone: var(--unknown); }
dl.numbers { display: grid; gap: .8rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
dl.numbers div { border-top: 1px solid var(--rule); padding-top: .5rem; }
dt { font-size: .9rem; color: var(--soft); } dd { margin: 0; } dd.value { font-weight: 650; }
dd.meaning { font-size: .9rem; }
.charts { display: grid; gap: 1.2rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; padding: .8rem;
  border: 1px solid var(--rule); border-radius: .4rem; min-width: 0; }
figure > svg { display: block; width: 100%; height: auto; }
.tick { font: 12px system-ui, "Open Sans", sans-serif; fill: var(--soft); }
.grid, .axis { stroke: var(--rule); fill: none; } .axis { stroke: var(--soft); }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; } .faint { opacity: .35; }
.line.faint { stroke-width: 1; }
.level { stroke: var(--soft); stroke-dasharray: 6 4; fill: none; stroke-width: 1.5; }
.hover { fill: transparent; } .broken { fill: var(--bad); font: bold 14px sans-serif; }
.line.s0 { stroke: var(--c0); } .dot.s0, .bar.s0 { fill: var(--c0); }
.line.s1 { stroke: var(--c1); stroke-dasharray: 7 2; } .dot.s1, .bar.s1 { fill: var(--c1); }
.line.s2 { stroke: var(--c2); stroke-dasharray: 2 2; } .dot.s2, .bar.s2 { fill: var(--c2); }
.line.s3 { stroke: var(--c3); stroke-dasharray: 9 3 2 3; } .dot.s3, .bar.s3 { fill: var(--c3); }
.bar.s4 { fill: var(--c4); } .bar.s5 { fill: var(--c5); } .bar.s6 { fill: var(--c6); }
.bar.s7 { fill: var(--c7); } .line.s4, .line.s5, .line.s6, .line.s7 { stroke: var(--c4); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0;
  margin: .4rem 0; font-size: .85rem; }
.key { width: 24px; height: 10px; margin-right: .35rem; }
.told { font-size: .85rem; margin: 0; }
.cards { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); }
.card { display: flex; gap: .9rem;
  border: 1px solid var(--rule); border-radius: .4rem; padding: .8rem; }
.card > div { min-width: 0; flex: 1; } .card img { width: 6.5rem; height: 6.5rem; flex: none;
  object-fit: contain; background: #fff; border-radius: .3rem; }
.nopicture { width: 6.5rem; flex: none; } .truth { font-weight: 650; }
.truth span { color: var(--soft); font-weight: 400; font-size: .85rem; }
.right { color: var(--good); }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; vertical-align: top;
  padding: .2rem .6rem .2rem 0; border-top: 1px solid var(--rule); font-size: .9rem; }
th { font-weight: 400; color: var(--soft); width: 34%; } .said th { width: 5.5rem; }
.id { margin: .4rem 0 0; font-size: .8rem; } ul { padding-left: 1.2rem; }
@media print { :root { color-scheme: light; --back: #fff; --card: #fff; --ink: #000; --soft: #333;
  --rule: #999; --good: #0a5c30; --middling: #6b4500; --bad: #8f1d17; --unknown: #333;
  --c0: #0b62c4; --c1: #c2410c; --c2: #0f766e; --c3: #a21caf; --c4: #8a6d00; --c5: #64748b;
  --c6: #4d7c0f; --c7: #9f1239; }
  body { max-width: none; padding: 0; font-size: 11px; } nav { display: none; }
  figure, .card, .verdict, tr, li { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .charts, .cards { grid-template-columns: 1fr 1fr; }
  .bar, .dot, .key { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
