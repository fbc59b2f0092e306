"use strict";
// Headers of sortable tables become buttons; without this script the tables stay as they are.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const headers = [...table.tHead.rows[0].cells];
  const text = (row, i) => (row.cells[i].querySelector("bdi") ?? row.cells[i]).textContent;
  headers.forEach((header, i) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    header.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const largestFirst = header.classList.contains("n");
      const now = header.getAttribute("aria-sort");
      const next = now === "none" ? (largestFirst ? "descending" : "ascending")
        : now === "ascending" ? "descending" : "ascending";
      for (const other of headers) other.setAttribute("aria-sort", "none");
      header.setAttribute("aria-sort", next);
      const sign = next === "ascending" ? 1 : -1;
      const compare = (a, b) => largestFirst
        ? a.cells[i].dataset.value - b.cells[i].dataset.value
        : text(a, i).localeCompare(text(b, i), undefined, { numeric: true });
      body.append(...[...body.rows].sort((a, b) => sign * compare(a, b)));
    });
  });
}
// On paper nothing stays folded.
const unfolded = [];
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details:not([open])")) {
    details.open = true;
    unfolded.push(details);
  }
});
addEventListener("afterprint", () => {
  while (unfolded.length) unfolded.pop().open = false;
});
