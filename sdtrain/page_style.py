"""How a run's page looks: one column on a phone, two on a desk, nothing fetched from anywhere."""

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --dim: #59636e; --line: #d8dee4; --paper: #fff;
        --back: #f6f8fa; --bar: #dde3e9; --mark: #0b6bcb; --good: #1a7f37; --warn: #8a6100;
        --bad: #cf222e }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --dim: #9aa4ae; --line: #30363d;
        --paper: #161b22; --back: #0d1117; --bar: #30363d; --mark: #4c9aff; --good: #3fb950;
        --warn: #d5a52a; --bad: #f85149 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--ink);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
main { max-width: 72rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .8rem }
h3 { font-size: 1rem; margin: 0 0 .4rem }
p { margin: .35rem 0 }
header p, figcaption, small, dt { color: var(--dim) }
header p { overflow-wrap: anywhere }
.bar { height: 6px; border-radius: 3px; background: var(--bar); overflow: hidden;
       margin-top: .6rem }
.bar i { display: block; height: 100%; background: var(--mark) }
.card, figure, .tiles div, .verdict { background: var(--paper); border: 1px solid var(--line);
       border-radius: 8px; padding: 1rem }
.verdict { margin-top: 1.2rem; border-left: 6px solid #8c959f }
.verdict h2 { margin: 0 0 .3rem; font-size: 1.4rem }
.verdict.good { border-left-color: var(--good) } .verdict.good h2 { color: var(--good) }
.verdict.warn { border-left-color: var(--warn) } .verdict.warn h2 { color: var(--warn) }
.verdict.bad { border-left-color: var(--bad) } .verdict.bad h2 { color: var(--bad) }
.tiles { display: grid; gap: .8rem; margin-top: .8rem;
         grid-template-columns: repeat(auto-fit, minmax(min(100%, 12rem), 1fr)) }
.tiles span { display: block; color: var(--dim); font-size: .85rem }
.tiles b { display: block; font-size: 1.5rem; line-height: 1.3; font-variant-numeric: tabular-nums }
.tiles small { font-size: .8rem }
.figures { display: grid; gap: .8rem;
           grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)) }
figure { margin: 0; min-width: 0 }
figure img { width: 100%; height: auto; display: block }
figcaption { font-size: .85rem; margin-top: .5rem }
@media (min-width: 62rem) {  /* an odd one out takes the row, its words beside it */
  .figures { grid-template-columns: 1fr 1fr }
  .figures figure:last-child:nth-child(odd) { grid-column: 1 / -1; display: grid;
    grid-template: auto 1fr / 1fr 1fr; column-gap: 2rem }
  .figures figure:last-child:nth-child(odd) img { grid-row: 1 / 3 }
  .figures figure:last-child:nth-child(odd) h3 { grid-area: 1 / 2; margin-top: 1rem }
  .figures figure:last-child:nth-child(odd) figcaption { grid-area: 2 / 2; margin: 0 }
}
.scroll { overflow-x: auto }
.pictures { width: auto }
.pictures th, .pictures td { border: 0; padding: 0 .5rem .5rem 0; vertical-align: bottom }
.pictures thead span { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 4;
       overflow: hidden; white-space: normal; overflow-wrap: anywhere }
.pictures small { display: block; font-weight: 400 }
.pictures thead th:not(:first-child), .pictures img { min-width: var(--wide); width: var(--wide) }
.pictures { --wide: clamp(7rem, calc(58rem / var(--n)), 16rem) }
.pictures th:first-child { position: sticky; left: 0; background: var(--paper); z-index: 1;
       font-variant-numeric: tabular-nums; text-align: right }
.pictures tbody th { vertical-align: middle }
.pictures img { height: auto; display: block } .pictures img.small { image-rendering: pixelated }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .35rem .9rem .35rem 0; white-space: nowrap;
         border-bottom: 1px solid var(--line) }
th { color: var(--dim); font-weight: 600; font-size: .85rem }
tbody tr:last-child td { border-bottom: 0 }
.n { text-align: right } .n:last-child { padding-right: 0 }
dl { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: .3rem 1.2rem;
     margin: 0 }
dd { margin: 0; overflow-wrap: anywhere; min-width: 0 }
details + details { border-top: 1px solid var(--line) }
summary { cursor: pointer; padding: .5rem 0; font-weight: 600 }
pre { overflow-x: auto; background: var(--back); border-radius: 6px; padding: .8rem;
      margin: .3rem 0;
      font: 13px/1.45 ui-monospace, "Cascadia Mono", Menlo, "DejaVu Sans Mono", monospace }
@media (max-width: 36rem) { .plan th, .plan td, td:first-child { white-space: normal }
  .plan th, .plan td { padding-right: .5rem }
  dl { grid-template-columns: 1fr; gap: 0 } dd { margin-bottom: .5rem } }
@media print { body { background: #fff } figure, .card { break-inside: avoid } }
"""
