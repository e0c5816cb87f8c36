"use strict";
// Additions for browsers with scripts: search, sorting and copying. Everything is on the page without them.
for (const part of document.querySelectorAll("[data-table]")) {
  const body = part.querySelector("tbody"), rows = [...body.rows], heads = [...part.querySelectorAll("thead th")];
  const search = part.querySelector("input"), shown = part.querySelector("output");
  const filter = () => {
    const wanted = search.value.trim().toLocaleLowerCase();
    let count = 0;
    for (const row of rows) {
      row.hidden = !row.textContent.toLocaleLowerCase().includes(wanted);
      count += !row.hidden;
    }
    shown.textContent = wanted ? `${count} of ${rows.length}` : "";
  };
  search.addEventListener("input", filter);
  search.hidden = false;
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const descending = head.getAttribute("aria-sort") !== "descending";
      const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const compare = (a, b) => {
        const [x, y] = [value(a), value(b)], [p, q] = [parseFloat(x), parseFloat(y)];
        return column && !(isNaN(p) && isNaN(q)) ? (isNaN(p) ? -Infinity : p) - (isNaN(q) ? -Infinity : q)
          : x.localeCompare(y);
      };
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      rows.sort((a, b) => (descending ? -1 : 1) * compare(a, b));
      body.append(...rows);
    });
  });
  const given = new URLSearchParams(location.hash.slice(1)).get("q");  // report.html#q=cat
  if (given) { search.value = given; filter(); }
}
for (const button of document.querySelectorAll("button[data-copy]")) {
  button.hidden = false;
  button.addEventListener("click", async () => {
    const source = button.parentElement.querySelector("pre");
    try {
      await navigator.clipboard.writeText(source.textContent);
      button.textContent = "copied";
    } catch {  // not allowed: select it
      getSelection().selectAllChildren(source);
      button.textContent = "selected";
    }
    setTimeout(() => { button.textContent = "copy"; }, 2000);
  });
}
