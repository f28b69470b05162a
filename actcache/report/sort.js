"use strict";
// Heads of tables become buttons: a click sorts, down, then up, then as it was. Without this the tables are as given.
for (const table of document.querySelectorAll("table.sorts")) {
  const body = table.tBodies[0], given = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const key = (row, column) => {
    const data = row.cells[column].querySelector("data");
    const text = data ? data.value : row.cells[column].textContent.trim(), bare = text.replaceAll(",", "");
    return bare === "" || isNaN(bare) ? text : Number(bare);
  };
  const compare = (a, b, sign) => {
    const numbers = [a, b].map((one) => typeof one === "number");
    if (numbers[0] !== numbers[1]) return numbers[0] ? -1 : 1; // what is no number comes last either way
    return sign * (numbers[0] ? a - b : a.localeCompare(b, "en", { numeric: true }));
  };
  heads.forEach((head, column) => {
    if (head.classList.contains("plain")) return;
    const button = document.createElement("button");
    button.type = "button";
    button.title = "sort";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      const turn = before === "descending" ? "ascending" : before === "ascending" ? null : "descending";
      for (const one of heads) one.removeAttribute("aria-sort");
      if (turn) head.setAttribute("aria-sort", turn);
      const sign = turn === "ascending" ? 1 : -1;
      const order = (a, b) => compare(key(a, column), key(b, column), sign);
      body.append(...(turn ? [...given].sort(order) : given));
    });
  });
}
