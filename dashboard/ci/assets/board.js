// All of this is for comfort: without it pages read as well. Charts are drawn from the tables below them; filters of exported pages, which no server
// answers, leave out rows.
"use strict";
(() => {
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const draw = (table) => {
    const rows = [...table.tBodies[0].rows];
    const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
    const figure = (row, at) => {
      const cell = row.cells[at];
      return cell && cell.dataset.v !== undefined ? Number(cell.dataset.v) : null;
    };
    const columns = heads.map((_, at) => at).filter((at) => rows.some((row) => figure(row, at) !== null));
    if (rows.length < 2 || columns.length < 2 || columns[0] !== 0) return;
    const data = columns.map((at) => rows.map((row) => figure(row, at)));
    const order = data[0].map((_, at) => at).sort((one, two) => data[0][one] - data[0][two]);
    const sorted = data.map((column) => order.map((at) => column[at]));
    const strokes = [colour("--accent"), colour("--warn"), colour("--good")];
    const axis = { stroke: colour("--faint"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line"), width: 1 } };
    const place = document.createElement("div");
    place.className = "plot";
    place.setAttribute("role", "img");
    place.setAttribute("aria-label", `${table.caption.textContent}: the table after it has the same figures`);
    const wide = table.closest(".wide");
    wide.before(place);
    const width = () => Math.max(280, place.clientWidth - 16);
    const plot = new uPlot({
      width: width(), height: 240,
      series: [{}, ...columns.slice(1).map((at, number) => ({
        label: heads[at], stroke: strokes[number % strokes.length], width: 1.5, points: { size: 5 }, spanGaps: true,
      }))],
      axes: [axis, { ...axis, size: 70, label: table.dataset.unit, labelSize: 18 }],
      scales: { y: { range: (_, low, high) => [Math.min(0, low), high === low ? high + 1 : high * 1.05] } },
    }, sorted, place);
    addEventListener("resize", () => plot.setSize({ width: width(), height: 240 }));
    const more = document.createElement("details");
    const summary = document.createElement("summary");
    summary.textContent = "The figures as a table";
    more.append(summary);
    wide.before(more);
    more.append(wide);
    return place;
  };

  const drawAll = () => {
    document.querySelectorAll(".plot").forEach((place) => {
      const more = place.nextElementSibling;
      more.after(more.querySelector(".wide"));
      more.remove();
      place.remove();
    });
    document.querySelectorAll("table.chart").forEach(draw);
  };

  const filter = () => {
    const query = new URLSearchParams(location.search);
    const form = document.querySelector("form.filter");
    if (!form) return;
    for (const [name, value] of query) {
      const field = form.elements.namedItem(name);
      if (field) field.value = value;
    }
    const rows = [...document.querySelectorAll("table.rows tbody tr")];
    let left = 0;
    for (const row of rows) {
      const is = (name) => !query.get(name) || row.dataset[name] === undefined || row.dataset[name] === query.get(name);
      const status = query.get("status");
      const states = row.dataset.status || "";
      const hasStatus = !status || row.dataset.status === undefined || states === status || (status === "slower" && states.endsWith(" slower"))
        || states === `${status} slower`;
      const q = (query.get("q") || "").toLowerCase();
      const shown = hasStatus && is("kind") && is("owner") && is("repository") && (row.dataset.name || "").toLowerCase().includes(q);
      row.hidden = !shown;
      left += shown;
    }
    const told = document.getElementById("shown");
    if (told) told.textContent = `${left} jobs`;
  };

  const age = () => {
    const place = document.getElementById("age");
    if (!place.dataset.collected) return;
    const seconds = Math.max(0, (Date.now() - Date.parse(place.dataset.collected)) / 1000);
    const units = [[86400, "d"], [3600, "h"], [60, "min"]];
    const [size, name] = units.find(([size]) => seconds >= size) || [1, "s"];
    place.querySelector("span").textContent = `${place.dataset.collected} (${Math.floor(seconds / size)} ${name} ago)`;
    place.classList.toggle("old", seconds > 86400);
  };

  filter();
  age();
  if (location.hash.startsWith("#e")) document.querySelectorAll(`${CSS.escape ? "#" + CSS.escape(location.hash.slice(1)) : location.hash} details`).forEach((one) => { one.open = true; });
  if (typeof uPlot !== "undefined") {
    drawAll();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  }
})();
