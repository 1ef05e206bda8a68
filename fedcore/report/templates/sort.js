"use strict";
for (const button of document.querySelectorAll("table.aligned button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = button.closest("table").tBodies[0];
    const column = Number(button.dataset.column), names = column === 0;
    const falling = head.ariaSort === "ascending" || (head.ariaSort === "none" && !names);
    for (const other of head.closest("thead").querySelectorAll("th[aria-sort]")) other.ariaSort = "none";
    head.ariaSort = falling ? "descending" : "ascending";
    const text = (row) => row.cells[column].firstChild?.textContent ?? "";
    const number = (row) => Number.parseFloat(text(row).replace("\u2212", "-").replaceAll(",", ""));
    const rows = [...body.rows].filter((row) => !row.classList.contains("total"));
    const sign = falling ? -1 : 1;
    rows.sort((a, b) => {
      if (names) return sign * text(a).localeCompare(text(b));
      const [x, y] = [number(a), number(b)];
      // A value that does not exist comes last in both directions.
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return sign * (x - y);
    });
    body.prepend(...rows);
  });
}
