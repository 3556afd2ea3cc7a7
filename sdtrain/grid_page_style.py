"""How the page of a grid looks and moves; nothing is fetched from anywhere."""

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --dim: #59636e; --line: #d8dee4; --paper: #fff;
        --back: #f6f8fa; --mark: #0b6bcb }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --dim: #9aa4ae; --line: #30363d;
        --paper: #161b22; --back: #0d1117; --mark: #4c9aff } }
* { box-sizing: border-box }
html, body { height: 100% }
body { margin: 0; display: flex; flex-direction: column; background: var(--back); color: var(--ink);
       font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
header, .variety { padding: .6rem 1rem }
h1 { font-size: 1.2rem; margin: 0; overflow-wrap: anywhere } h2 { font-size: 1rem; margin: 0 }
p { margin: .15rem 0; color: var(--dim); font-size: .85rem; max-width: 70rem }
.board { --cell: 256px; flex: 1 1 60%; min-height: 16rem; overflow: auto; cursor: grab;
         border: solid var(--line); border-width: 1px 0; background: var(--paper) }
.board.dragged { cursor: grabbing; user-select: none }
.board table { border-collapse: separate; border-spacing: 0 }
.board th { background: var(--paper); font-weight: 600; font-size: .85rem; text-align: left;
            position: sticky; z-index: 1; padding: .4rem .5rem }
.board thead th { top: 0; vertical-align: bottom; width: var(--cell); max-width: var(--cell);
                  overflow-wrap: anywhere; border-bottom: 1px solid var(--line) }
.board tbody th { left: 0; min-width: 6.5rem; max-width: 10rem; overflow-wrap: anywhere;
                  border-right: 1px solid var(--line) }
.board thead th:first-child { left: 0; z-index: 2; width: auto; color: var(--dim) }
.board td { padding: 3px }
.board button { display: block; padding: 0; border: 0; background: none; cursor: inherit;
                width: var(--cell) }
.board button:focus-visible, .board:focus-visible { outline: 3px solid var(--mark);
                outline-offset: -3px }
.board button img { width: 100%; display: block }
img.small { image-rendering: pixelated }
.variety { flex: 0 1 auto; overflow: auto; max-height: 40% }
.scroll { overflow-x: auto }
.variety table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem }
.variety th, .variety td { text-align: left; padding: .25rem 1rem .25rem 0; max-width: 16rem;
                           border-bottom: 1px solid var(--line) }
.variety th { min-width: 5.5rem } .variety .n { text-align: right }
dialog { width: 100vw; height: 100vh; max-width: none; max-height: none; border: 0; padding: 0;
         background: var(--back); color: var(--ink) }
dialog[open] { display: flex; flex-direction: column }
.panes { flex: 1; min-height: 0; display: flex; gap: 2px }
figure { flex: 1; min-width: 0; margin: 0; display: flex; flex-direction: column;
         overflow: hidden; position: relative; background: var(--paper); touch-action: none }
figure[hidden] { display: none }
figure img { flex: 1; min-height: 0; width: 100%; object-fit: contain; cursor: grab;
             user-select: none }
figcaption { max-height: 30%; overflow: auto; flex: none;
             padding: .4rem .8rem; font-size: .9rem; background: var(--back); z-index: 1;
             overflow-wrap: anywhere }
.keys { display: flex; flex-wrap: wrap; gap: .4rem; padding: .5rem .8rem }
.keys button { font: inherit; padding: .35rem .8rem; border-radius: 6px; color: inherit;
               border: 1px solid var(--line); background: var(--paper); cursor: pointer }
@media (max-width: 40rem) { .board { --cell: 160px } .panes { flex-direction: column }
                            .board tbody th { min-width: 4.5rem; max-width: 5rem;
                                              font-size: .75rem } }
"""

SCRIPT = """
(() => {
const board = document.querySelector('.board'), dialog = document.querySelector('dialog');
const [kept, shown] = dialog.querySelectorAll('figure');
const cells = new Map();
for (const b of board.querySelectorAll('button'))
  cells.set(b.dataset.row + ' ' + b.dataset.column, b);
let size = parseFloat(getComputedStyle(board).getPropertyValue('--cell')) || 256, first = size;

function zoom(factor, x, y) {
  const box = board.getBoundingClientRect();
  x = (x ?? box.left + box.width / 2) - box.left; y = (y ?? box.top + box.height / 2) - box.top;
  const corner = board.querySelector('thead th').getBoundingClientRect();
  const before = size;
  size = Math.min(2048, Math.max(32, size * factor));
  board.style.setProperty('--cell', size + 'px');
  const f = size / before;
  board.scrollLeft = (board.scrollLeft + x - corner.width) * f - x + corner.width;
  board.scrollTop = (board.scrollTop + y - corner.height) * f - y + corner.height;
}
board.addEventListener('wheel', e => {
  if (e.shiftKey) return;
  e.preventDefault(); zoom(Math.exp(-e.deltaY * (e.deltaMode ? .05 : .0015)), e.clientX, e.clientY);
}, {passive: false});

let from = null, moved = false;
board.addEventListener('pointerdown', e => {
  if (e.pointerType === 'touch' || e.button) return;
  from = [e.clientX, e.clientY, board.scrollLeft, board.scrollTop]; moved = false;
});
addEventListener('pointermove', e => {
  if (!from) return;
  const dx = e.clientX - from[0], dy = e.clientY - from[1];
  if (Math.hypot(dx, dy) > 4) { moved = true; board.classList.add('dragged') }
  if (moved) { board.scrollLeft = from[2] - dx; board.scrollTop = from[3] - dy }
});
addEventListener('pointerup', () => { from = null; board.classList.remove('dragged') });

const steps = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};
function neighbour(button, step) {
  let row = +button.dataset.row, column = +button.dataset.column;
  do { row += step[0]; column += step[1] } while (row >= 0 && column >= 0 && row < 9999 &&
    column < 9999 && !cells.has(row + ' ' + column) && (row || column));
  return cells.get(row + ' ' + column) || button;
}
board.addEventListener('keydown', e => {
  if (e.ctrlKey || e.metaKey || e.altKey) return;
  if (e.key === '+' || e.key === '=') zoom(1.25);
  else if (e.key === '-') zoom(.8);
  else if (e.key === '0') zoom(first / size);
  else if (steps[e.key] && e.target.matches('button')) neighbour(e.target, steps[e.key]).focus();
  else return;
  e.preventDefault();
});
board.addEventListener('click', e => {
  const button = e.target.closest('button');
  if (button && !moved) { look(button); dialog.showModal() }
});

let now = null, view = {scale: 1, x: 0, y: 0};
function fill(figure, button) {
  const image = figure.querySelector('img'), source = button.querySelector('img');
  image.src = source.src; image.className = source.className;
  image.alt = figure.querySelector('figcaption').textContent = button.getAttribute('aria-label');
}
function look(button) { now = button; fill(shown, button) }
function place() {
  for (const image of dialog.querySelectorAll('img'))
    image.style.transform = `translate(${view.x}px, ${view.y}px) scale(${view.scale})`;
}
function closer(factor) { view.scale = Math.min(32, Math.max(.2, view.scale * factor)); place() }
function act(what) {
  const step = {left: [0, -1], right: [0, 1], up: [-1, 0], down: [1, 0]}[what];
  if (step) look(neighbour(now, step));
  else if (kept.hidden) { fill(kept, now); kept.hidden = false }
  else kept.hidden = true;
}
dialog.addEventListener('keydown', e => {
  if (e.ctrlKey || e.metaKey || e.altKey) return;
  if (steps[e.key]) act(e.key.slice(5).toLowerCase());
  else if (e.key === 'p' || e.key === 'P') act('keep');
  else if (e.key === '+' || e.key === '=') closer(1.25);
  else if (e.key === '-') closer(.8);
  else if (e.key === '0') { view = {scale: 1, x: 0, y: 0}; place() }
  else return;
  e.preventDefault();
});
for (const button of dialog.querySelectorAll('[data-do]'))
  button.addEventListener('click', () => act(button.dataset.do));
dialog.addEventListener('wheel', e => {
  e.preventDefault(); closer(Math.exp(-e.deltaY * .0015));
}, {passive: false});
let hold = null;
for (const image of dialog.querySelectorAll('img')) image.draggable = false;
dialog.addEventListener('pointerdown', e => {
  if (e.target.matches('img')) hold = [e.clientX - view.x, e.clientY - view.y];
});
dialog.addEventListener('pointermove', e => {
  if (hold) { view.x = e.clientX - hold[0]; view.y = e.clientY - hold[1]; place() }
});
addEventListener('pointerup', () => { hold = null });
dialog.addEventListener('close', () => {
  kept.hidden = true; view = {scale: 1, x: 0, y: 0}; place(); if (now) now.focus();
});

const again = +document.body.dataset.refresh;
if (again) setInterval(() => { if (!dialog.open) location.reload() }, again * 1000);
})();
"""
