"""How the page of `sdtrain inspect` looks; nothing is fetched from anywhere."""

FORWARDS = ("#0b6bcb", "#b35900", "#1a7f37", "#8250df", "#bf3989", "#0f766e", "#a15c00", "#59636e")
"""Colours of the forwards of a step, in turn."""

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --dim: #59636e; --line: #d8dee4; --paper: #fff;
        --back: #f6f8fa; --mark: #0b6bcb; --soft: #ddf0ff; --soft2: #eaeef2; --good: #1a7f37;
        --warn: #8a6100; --bad: #cf222e; --badback: #ffebe9; --pad: #e4e8ec }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --dim: #9aa4ae; --line: #30363d;
        --paper: #161b22; --back: #0d1117; --mark: #4c9aff; --soft: #12365c; --soft2: #262c34;
        --good: #3fb950; --warn: #d5a52a; --bad: #f85149; --badback: #3d1a1d; --pad: #2a3038 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--ink);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
main { max-width: 84rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem }
h3 { font-size: .8rem; margin: .9rem 0 .25rem; color: var(--dim); font-weight: 600 }
p { margin: .3rem 0; overflow-wrap: anywhere }
small, figcaption, dt, .dim { color: var(--dim) }
.tiles { display: grid; gap: .7rem; margin: 1rem 0;
         grid-template-columns: repeat(auto-fit, minmax(min(100%, 9.5rem), 1fr)) }
.tiles div, .step, article { background: var(--paper); border: 1px solid var(--line);
         border-radius: 8px; padding: .8rem 1rem }
.tiles b { display: block; font-size: 1.35rem; line-height: 1.3;
           font-variant-numeric: tabular-nums }
.tiles span { color: var(--dim); font-size: .85rem }
.tiles .bad b { color: var(--bad) }
.step svg { display: block; width: 100%; height: auto; margin: .3rem 0 }
.step text { fill: var(--dim); font: 11px system-ui, "DejaVu Sans", sans-serif }
.step line { stroke: var(--line) } .step .axis { stroke: var(--dim) }
article { margin-top: .9rem }
article header { display: flex; flex-wrap: wrap; align-items: center; gap: .35rem .5rem;
                 margin-bottom: .6rem }
article header strong { overflow-wrap: anywhere }
.no { display: inline-block; min-width: 1.7rem; padding: 0 .4rem; border-radius: 1rem;
      text-align: center; color: #fff; font-weight: 600 }
.tag { font-size: .8rem; padding: .05rem .5rem; border-radius: 1rem; background: var(--soft2);
       white-space: nowrap }
.tag.bad { background: var(--badback); color: var(--bad) } .tag.on { background: var(--soft) }
.pictures { display: grid; gap: .7rem; align-items: start;
            grid-template-columns: repeat(4, minmax(0, 1fr)) }
@media (max-width: 52rem) { .pictures { grid-template-columns: repeat(2, minmax(0, 1fr)) } }
figure { margin: 0; min-width: 0 }
figcaption { font-size: .8rem; margin-top: .25rem; line-height: 1.35 }
.shot { position: relative; display: block; overflow: hidden; border-radius: 4px;
        background: var(--soft2); width: min(100%, calc(21rem * var(--aspect))) }
.shot img { display: block; width: 100%; height: auto }
.shot img + img { position: absolute; inset: 0; width: 100%; height: 100% }
.shot i { position: absolute; outline: 2px solid #fff; border: 1px solid #000;
          box-shadow: 0 0 0 9999px rgba(0, 0, 0, .5) }
.shot u { position: absolute; border: 2px dashed #ff4d5e; background: rgba(214, 40, 57, .25) }
.words { display: grid; gap: 0 2rem; grid-template-columns: minmax(0, 1fr) 20rem;
         margin-top: .4rem }
@media (max-width: 52rem) { .words { grid-template-columns: minmax(0, 1fr) } }
.chunk { margin: .35rem 0 }
.bar { display: flex; height: 5px; border-radius: 3px; overflow: hidden; background: var(--pad);
       max-width: 30rem }
.bar b { background: var(--ink) } .bar i { background: var(--mark) }
.text { overflow-wrap: anywhere; white-space: pre-wrap; line-height: 1.75 }
.text span { border-radius: 3px; background: var(--soft) }
.text span:nth-child(even) { background: var(--soft2) }
.text em { font-style: normal; color: var(--dim); font-size: .72rem; border: 1px solid var(--line);
           border-radius: 3px; padding: 0 .25rem; margin: 0 .2rem }
.cut .text span { background: var(--badback); color: var(--bad); text-decoration: line-through }
.cut h3 { color: var(--bad) }
.none { color: var(--bad); font-weight: 600 }
.struck { color: var(--dim); text-decoration: line-through; font-size: .88rem }
.struck b { font-weight: 400; text-decoration: line-through; margin-right: .55rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .12rem .9rem; margin: 0;
     font-size: .88rem; font-variant-numeric: tabular-nums }
dd { margin: 0; overflow-wrap: anywhere; min-width: 0 }
details { margin-top: 1rem } summary { cursor: pointer; font-weight: 600 }
@media print { article, .step { break-inside: avoid } }
"""
