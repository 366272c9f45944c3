"use strict";
// Tooltips: titles of chart marks, shown at once. Text only, never markup.
const tip = document.getElementById("tip");
for (const title of document.querySelectorAll("svg g > title, svg.bar > title")) {
  const mark = title.parentNode;
  mark.dataset.tip = title.textContent;
  if (mark.tagName === "svg") mark.setAttribute("aria-label", title.textContent);
  title.remove();
}
document.addEventListener("pointermove", (event) => {
  const mark = event.target.closest ? event.target.closest("[data-tip]") : null;
  tip.hidden = !mark;
  if (!mark) return;
  tip.textContent = mark.dataset.tip;
  const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
  const below = event.clientY + 18;
  const top = below + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 12 : below;
  tip.style.left = Math.max(8, left) + "px";
  tip.style.top = Math.max(8, top) + "px";
});
document.addEventListener("scroll", () => { tip.hidden = true; }, { passive: true, capture: true });

// Sorting: a heading's first press puts large numbers and early letters on top.
const table = document.getElementById("tensors");
if (table) {
  const body = table.tBodies[0];
  const rows = Array.from(body.rows);
  const heads = Array.from(table.tHead.rows[0].cells);
  const natural = new Intl.Collator("en", { numeric: true });
  heads.forEach((head, column) => {
    head.firstChild.addEventListener("click", () => {
      const number = head.classList.contains("n");
      const before = head.getAttribute("aria-sort");
      const down = before ? before === "ascending" : number;
      const key = (row) => (number ? +row.cells[column].dataset.v : row.cells[column].textContent);
      const keyed = rows.map((row, order) => ({ row, order, key: key(row) }));
      const compare = number ? (a, b) => a.key - b.key : (a, b) => natural.compare(a.key, b.key);
      keyed.sort((a, b) => (down ? -compare(a, b) : compare(a, b)) || a.order - b.order);
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      body.append(...keyed.map((item) => item.row));
    });
  });
}
