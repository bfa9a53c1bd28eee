"use strict";
// Sorts and filters the leaderboards and draws the figures from the records in #figures. Names become text, never markup.

const COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "currentColor", "#8C6D31"]; // Okabe and Ito
const DASHES = ["", "6 3", "2 2", "9 3 2 3"]; // one a round of colours
const SVG = new Set(["svg", "g", "rect", "line", "path", "circle", "text", "title"]);
const WIDTH = 560, HEIGHT = 340, LEFT = 62, BOTTOM = 44, TOP = 10, RIGHT = 14;

function node(tag, attributes, ...children) {
  const made = SVG.has(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const text = (words, x, y, more = {}) => node("text", { x, y, fill: "currentColor", ...more }, words);
const line = (x1, y1, x2, y2, more = {}) => node("line", { x1, y1, x2, y2, stroke: "currentColor", ...more });
const width = (names) => 6.4 * Math.max(0, ...names.map((name) => name.length)); // of the longest one, in the font of the figures
const path = (points) => "M" + points.map((point) => point.map((value) => value.toFixed(1)).join(" ")).join("L");
const known = (value) => value !== null && value !== undefined;
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 4 });

function number(value) {
  if (!known(value)) return "none";
  return Math.abs(value) >= 1e5 ? compact.format(value) : String(Number(value.toPrecision(4)));
}

const interval = ([mean, low, high]) => number(mean) + (known(low) ? ` [${number(low)}, ${number(high)}]` : "");

// --- scales and frames

function steps(low, high, log) {
  const found = [];
  if (log) {
    const parts = high / low > 1000 ? [1] : [1, 2, 5];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      found.push(...parts.map((part) => part * 10 ** power));
  } else {
    const size = 10 ** Math.floor(Math.log10((high - low) / 4));
    const step = size * [1, 2, 5, 10].find((factor) => (high - low) / (size * factor) <= 6);
    for (let count = Math.ceil(low / step); count * step <= high; count++) found.push(count * step);
  }
  return found.filter((value) => value >= low && value <= high);
}

// Maps the numbers of an axis {label, values, ticks, log, whole} to from..to; logarithmic where they are positive and span a factor of 30.
function scale(axis, from, to) {
  let low = Math.min(...axis.values), high = Math.max(...axis.values);
  const log = axis.log ?? (low > 0 && high / low > 30), map = log ? Math.log : Number;
  const room = log ? (high / low) ** 0.05 || 1 : (high - low) * 0.05;
  [low, high] = log ? [low / room, high * room] : [low - room, high + room];
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - 0.5, high + 0.5];
  const place = (value) => from + ((map(value) - map(low)) / (map(high) - map(low))) * (to - from);
  const ticks = (axis.ticks ?? steps(low, high, log)).filter((tick) => !axis.whole || Number.isInteger(tick));
  return { place, ticks, label: axis.label + (log ? ", log scale" : "") };
}

function canvas(width, height) {
  const size = { viewBox: `0 0 ${width} ${height}`, style: `min-width:${0.8 * width}px;max-width:${1.35 * width}px` };
  return node("svg", { xmlns: "http://www.w3.org/2000/svg", ...size, role: "img", "font-family": "system-ui,sans-serif", "font-size": 11 });
}

// An svg with both axes, their ticks and units; null where an axis has no numbers.
function frame(xAxis, yAxis, { height = HEIGHT, left = LEFT, right = RIGHT } = {}) {
  if (!xAxis.values.length || !yAxis.values.length) return null;
  const svg = canvas(WIDTH, height), floor = height - BOTTOM, end = WIDTH - right;
  const x = scale(xAxis, left, end), y = scale(yAxis, floor, TOP);
  for (const tick of x.ticks)
    svg.append(line(x.place(tick), TOP, x.place(tick), floor, { "stroke-opacity": 0.12 }), text(number(tick), x.place(tick), floor + 15, { "text-anchor": "middle" }));
  for (const tick of y.ticks)
    svg.append(line(left, y.place(tick), end, y.place(tick), { "stroke-opacity": 0.12 }), text(yAxis.name?.(tick) ?? number(tick), left - 6, y.place(tick) + 4, { "text-anchor": "end" }));
  svg.append(text(x.label, (left + end) / 2, height - 8, { "text-anchor": "middle", class: "axis" }));
  svg.append(text(y.label, 13, (TOP + floor) / 2, { "text-anchor": "middle", class: "axis", transform: `rotate(-90 13 ${(TOP + floor) / 2})` }));
  return { svg, x: x.place, y: y.place };
}

// Puts a drawing into a card, with a link to it as a file of its own, which has no page to take its colours from.
function show(card, svg, name) {
  if (!svg) return card.plot.append(node("p", {}, "No run of this setting has these numbers."));
  svg.setAttribute("aria-label", name);
  const link = node("a", { href: "#", download: `${name}.svg` }, "SVG");
  link.addEventListener("click", () => {
    const copy = svg.cloneNode(true);
    copy.setAttribute("style", "color:#1f2933;background:#fff");
    link.href = "data:image/svg+xml;charset=utf-8," + encodeURIComponent(new XMLSerializer().serializeToString(copy));
  });
  card.plot.append(node("figure", {}, svg, node("figcaption", {}, link)));
}

// --- the shapes that figures are made of

// Lines [x, mean, lowest, highest] by label over x, of the ticked methods, each named at its end; dotted levels by name.
function drawLines(page, { lines, xAxis, yAxis, levels = {} }) {
  const own = Object.entries(lines).filter(([label]) => page.ticked.has(label)), points = own.flatMap(([, places]) => places);
  if (!points.length) return null;
  xAxis.values = points.map((point) => point[0]);
  yAxis.values = [...points.flatMap((point) => point.slice(1)), ...Object.values(levels)].filter(known);
  const right = RIGHT + width(own.map(([label]) => label)), { svg, x, y } = frame(xAxis, yAxis, { right });
  for (const [name, level] of Object.entries(levels).filter(([, level]) => known(level)))
    svg.append(node("g", {}, line(LEFT, y(level), WIDTH - right, y(level), { "stroke-dasharray": "2 4", "stroke-opacity": 0.7 }), text(name, LEFT + 3, y(level) - 3, { "font-size": 9 }), node("title", {}, `${name}: ${number(level)}`)));
  const names = apart(own.map(([, places]) => y(places.at(-1)[1])), HEIGHT - BOTTOM);
  for (const [row, [label, places]] of own.entries()) {
    const { colour, dash } = page.styles[label];
    const band = [...places.map(([at, , , high]) => [x(at), y(high)]), ...places.map(([at, , low]) => [x(at), y(low)]).reverse()];
    const group = node("g", { "data-label": label }, node("path", { d: path(band) + "Z", fill: colour, "fill-opacity": 0.13 }));
    group.append(node("path", { d: path(places.map(([at, mean]) => [x(at), y(mean)])), fill: "none", stroke: colour, "stroke-width": 1.8, "stroke-dasharray": dash }));
    for (const [at, ...numbers] of places)
      group.append(node("circle", { cx: x(at), cy: y(numbers[0]), r: 2.4, fill: colour }, node("title", {}, `${label} at ${at}: ${interval(numbers)}`)));
    group.append(text(label, x(places.at(-1)[0]) + 6, names[row] + 4, { fill: colour }));
    svg.append(group);
  }
  return svg;
}

// The heights `wanted` for the names of lines, moved so that none lies on another, as far as there is room above the floor.
function apart(wanted, floor) {
  const order = [...wanted.keys()].sort((one, other) => wanted[one] - wanted[other]), found = [...wanted], step = Math.min(12, (floor - TOP) / wanted.length);
  order.forEach((row, place) => { if (place) found[row] = Math.max(found[row], found[order[place - 1]] + step); });
  order.reverse().forEach((row, place) => { found[row] = Math.min(found[row], place ? found[order[place - 1]] - step : floor); });
  return found;
}

// One point a method, ticked ones with name and intervals; `curves` are learning-rate curves, `front` asks for the Pareto front.
function drawScatter(page, xName, yName, { curves = [], front = false } = {}) {
  const points = page.methods.map((method) => ({ ...method, x: method.measures[xName], y: method.measures[yName] })).filter(({ x, y }) => known(x[0]) && known(y[0]));
  const drawn = curves.flatMap((curve) => {
    const method = page.methods.find((one) => one.method === curve.method && page.ticked.has(one.label));
    const through = curve.points.filter((point) => known(point[xName]) && known(point[yName]));
    return method && through.length > 1 ? [{ ...curve, points: through, label: method.label }] : [];
  });
  const values = (side, name) => [...points.flatMap((one) => (page.ticked.has(one.label) ? one[side] : [one[side][0]])), ...drawn.flatMap((curve) => curve.points.map((point) => point[name]))].filter(known);
  const axes = [["x", xName], ["y", yName]].map(([side, name]) => ({ label: page.axes[name], values: values(side, name) }));
  const means = points.flatMap(({ x }) => x[0]);
  axes[0].log = Math.min(...means, ...axes[0].values) > 0 && Math.max(...means) / Math.min(...means) > 30;
  axes[1].log = false;
  const framed = frame(...axes);
  if (!framed) return null;
  const { svg, x, y } = framed;
  if (front) svg.append(drawFront(points, x, y));
  for (const { label, others, points: through } of drawn) {
    const curve = node("g", { "data-curve": label }, node("path", { d: path(through.map((point) => [x(point[xName]), y(point[yName])])), fill: "none", stroke: page.styles[label].colour }));
    for (const point of through)
      curve.append(node("circle", { cx: x(point[xName]), cy: y(point[yName]), r: 2, fill: page.styles[label].colour }, node("title", {}, `${label} at learning rate ${point.rate} ${others}: ${number(point[xName])}, ${number(point[yName])}`)));
    svg.append(curve);
  }
  for (const one of points) svg.append(drawPoint(page, one, x, y));
  return svg;
}

function drawPoint(page, { label, x: across, y: up }, x, y) {
  const { colour } = page.styles[label], at = [x(across[0]), y(up[0])], ticked = page.ticked.has(label);
  const group = node("g", { "data-label": label, opacity: ticked ? 1 : 0.45 }, node("title", {}, `${label}: ${interval(across)}, ${interval(up)}`));
  if (ticked && known(across[1])) group.append(line(x(across[1]), at[1], x(across[2]), at[1], { stroke: colour }));
  if (ticked && known(up[1])) group.append(line(at[0], y(up[1]), at[0], y(up[2]), { stroke: colour }));
  group.append(node("circle", { cx: at[0], cy: at[1], r: 4, fill: colour }));
  if (ticked) group.append(at[0] > WIDTH * 0.75 ? text(label, at[0] - 7, at[1] - 6, { "text-anchor": "end" }) : text(label, at[0] + 7, at[1] - 6));
  return group;
}

// Where no other method costs less (x) and reaches as much (y), or as much and more.
function drawFront(points, x, y) {
  const beaten = (one, other) => other.x[0] <= one.x[0] && other.y[0] >= one.y[0] && (other.x[0] < one.x[0] || other.y[0] > one.y[0]);
  const best = points.filter((one) => !points.some((other) => beaten(one, other))).sort((one, other) => one.x[0] - other.x[0] || one.y[0] - other.y[0]);
  const stairs = best.flatMap(({ x: [cost], y: [gain] }, place) => (place ? [[x(cost), y(best[place - 1].y[0])], [x(cost), y(gain)]] : [[x(cost), y(gain)]]));
  return node("path", { d: path(stairs), fill: "none", stroke: "currentColor", "stroke-dasharray": "4 3", "data-front": best.map(({ label }) => label).join("|") });
}

// Horizontal bars {label, title, spans: [[from, to, colour]], point}, one row each.
function drawSpans(rows, label, whole = false) {
  const left = 34 + width(rows.map((row) => row.label)), height = rows.length * 17 + BOTTOM + TOP;
  const yAxis = { label: "method (name)", values: [-rows.length + 0.5, -0.5], ticks: rows.map((_, place) => -place - 0.5), name: (tick) => rows[-tick - 0.5].label, log: false };
  const framed = frame({ label, values: rows.flatMap((row) => row.spans.flatMap(([from, to]) => [from, to])), log: false, whole }, yAxis, { height, left });
  if (!framed) return null;
  rows.forEach(({ label, title, spans, point }, place) => {
    const at = framed.y(-place - 0.5), group = node("g", { "data-label": label }, node("title", {}, title));
    for (const [from, to, colour] of spans)
      group.append(node("rect", { x: framed.x(from), y: at - 5, width: Math.max(framed.x(to) - framed.x(from), 0.5), height: 10, fill: colour, "fill-opacity": known(point) ? 0.45 : 1 }));
    if (known(point)) group.append(node("circle", { cx: framed.x(point), cy: at, r: 3.5, fill: spans[0][2] }));
    framed.svg.append(group);
  });
  return framed.svg;
}

// Cells {title, words, fill, opacity, frame} by row and column, with the names of both, and what they are: `down` and `across`.
function drawGrid(rowNames, columnNames, cells, size, { down, across }) {
  const left = 28 + width(rowNames), top = 12 + width(columnNames);
  const wide = Math.max(left + size * columnNames.length + 4, 8 + width([across])), high = Math.max(top + size * rowNames.length + 24, 8 + width([down]));
  const svg = canvas(wide, high);
  svg.append(text(across, wide - 4, high - 7, { "text-anchor": "end", class: "axis" }));
  svg.append(text(down, 13, high / 2, { "text-anchor": "middle", class: "axis", transform: `rotate(-90 13 ${high / 2})` }));
  rowNames.forEach((name, row) => svg.append(text(name, left - 5, top + (row + 0.5) * size + 4, { "text-anchor": "end" })));
  columnNames.forEach((name, column) => {
    const at = left + (column + 0.5) * size + 4;
    svg.append(text(name, at, top - 5, { transform: `rotate(-90 ${at} ${top - 5})` }));
  });
  cells.forEach((row, place) => row.forEach((cell, column) => {
    if (!cell) return;
    const x = left + column * size, y = top + place * size, edge = { stroke: "currentColor", "stroke-opacity": cell.frame ? 1 : 0.15 };
    svg.append(node("g", { "data-cell": `${place},${column}` }, node("title", {}, cell.title),
      node("rect", { x: x + 0.5, y: y + 0.5, width: size - 1, height: size - 1, fill: cell.fill, "fill-opacity": cell.opacity, ...edge }),
      text(cell.words, x + size / 2, y + size / 2 + 4, { "text-anchor": "middle", fill: cell.opacity > 0.55 ? "#fff" : "currentColor", "font-size": 9 })));
  }));
  return svg;
}

// --- the figures

// The value of a card's select box, which is made on the first call.
function choose(card, name, options, labels = {}) {
  let box = card.querySelector(`select[name=${name}]`);
  if (!box) {
    box = node("select", { name, "aria-label": name }, ...options.map((value) => node("option", { value }, labels[value] ?? String(value).replaceAll("_", " "))));
    box.addEventListener("change", card.draw);
    card.controls.append(box);
  }
  return box.value;
}

const FIGURES = {
  ranks(card, page) {
    const name = choose(card, "measure", Object.keys(page.methods[0].ranks));
    const rivals = page.methods.filter((one) => known(one.ranks[name][0])).sort((one, other) => other.measures[name][0] - one.measures[name][0]);
    const rows = rivals.map(({ label, ranks }, place) => {
      const [best, worst] = ranks[name];
      return { label, title: `${label}: rank ${best} to ${worst}`, spans: [[best - 0.3, worst + 0.3, page.styles[label].colour]], point: place + 1 };
    });
    show(card, drawSpans(rows, `rank by ${page.axes[name].replace(/ \(.*/, "")} (1 is best)`, true), "ranks");
  },
  plane(card, page) {
    const across = choose(card, "across", page.measured("learning_accuracy", "average_accuracy"), page.axes);
    const measure = choose(card, "measure", page.measured("retention_probability", "retention", "forgetting", "bwt"), page.axes);
    show(card, across && measure && drawScatter(page, across, measure, { curves: page.tuning }), "stability-plasticity");
  },
  stages(card, page) {
    for (const [measure, lines] of Object.entries(page.stages).filter(([, lines]) => Object.keys(lines).length)) {
      const axes = { xAxis: { label: "stages trained (count)", log: false, whole: true }, yAxis: { label: page.axes[measure] } };
      show(card, drawLines(page, { lines, ...axes, levels: measure === "accuracy" ? page.references : { "untouched model": 1 } }), measure);
    }
  },
  matrix(card, page) {
    const names = page.matrices.map(({ name }) => name), run = page.matrices[choose(card, "run", [...names.keys()], names)];
    const cells = run.scores.map((scores, stage) => scores.map((score, task) => ({
      title: `${run.tasks[task]} after ${run.stages[stage]}: ${number(score)} (fraction of 1)`, words: known(score) ? score.toFixed(2) : "",
      fill: "#0072B2", opacity: score ?? 0, frame: stage === task + 1,
    })));
    show(card, drawGrid(run.stages, run.tasks, cells, 28, { down: "after stage (task)", across: "task (score: fraction of 1)" }), "matrix");
  },
  items(card, page) {
    const rows = page.methods.filter(({ measures }) => known(measures.lost_corrected[0])).map(({ label, measures: { lost_corrected: lost, gained_corrected: gained } }) => ({
      label, title: `${label}: lost ${interval(lost)}, gained ${interval(gained)}`, spans: [[-lost[0], 0, "#D55E00"], [0, gained[0], "#009E73"]],
    }));
    show(card, drawSpans(rows, "lost and gained items (fraction of 1)"), "items");
  },
  verdicts(card, page) {
    const measure = choose(card, "measure", Object.keys(page.pairs), page.axes), names = page.methods.map(({ label }) => label);
    const cells = names.map(() => Array(names.length).fill(null)), looks = { better: ["+", "#0072B2"], worse: ["−", "#D55E00"], "not separated": ["·", "none"], "too few blocks": ["", "none"] };
    const fill = (one, other, verdict, numbers, q, needed) => {
      const [words, colour] = looks[verdict];
      const title = `${names[one]} against ${names[other]}: ${verdict}, ${interval(numbers)}, q ${number(q)}; blocks needed: ${number(needed)}`;
      cells[one][other] = { title, words, fill: colour, opacity: colour === "none" ? 0 : 0.8 };
    };
    const mirrored = { better: "worse", worse: "better" }, minus = (value) => (known(value) ? -value : null);
    for (const [one, other, verdict, mean, low, high, q, needed] of page.pairs[measure] ?? []) {
      fill(one, other, verdict, [mean, low, high], q, needed);
      fill(other, one, mirrored[verdict] ?? verdict, [mean, high, low].map(minus), q, needed);
    }
    show(card, measure && drawGrid(names, names, cells, 18, { down: "method (name)", across: `against, by ${page.axes[measure]}` }), "verdicts");
  },
  drift(card, page) {
    const across = choose(card, "across", page.measured("kl_to_base", "update_norm", "perplexity_ratio"), page.axes);
    const up = choose(card, "up", page.measured("forgetting", "retention", "retention_probability"), page.axes);
    show(card, across && up && drawScatter(page, across, up), "drift");
  },
  cost(card, page) {
    const across = choose(card, "cost", page.measured("tokens_trained", "flops", "seconds_train", "peak_memory_bytes", "trainable_parameters"), page.axes);
    show(card, across && drawScatter(page, across, "average_accuracy", { front: true }), "cost");
  },
  bands(card, page) {
    const measure = choose(card, "measure", Object.keys(page.bands).filter((name) => Object.keys(page.bands[name]).length), page.axes);
    const lines = page.bands[measure] ?? {}, ticks = [...new Set(Object.values(lines).flat().map(([times]) => times))];
    show(card, drawLines(page, { lines, xAxis: { label: "how often the text states a fact (count)", ticks, log: true }, yAxis: { label: page.axes[measure], log: false } }), "bands");
  },
};

// --- the page

// A click on a heading sorts a table by its column, numbers from the highest on and names from a, a second click the other way round. What is
// no number in a column of numbers goes last.
function sortable(table) {
  const body = table.tBodies[0];
  for (const heading of table.tHead.rows[0].cells) {
    const button = node("button", { type: "button" }, heading.textContent), value = (row) => row.cells[heading.cellIndex].textContent;
    const figure = (row) => parseFloat(value(row).replaceAll(",", ""));
    button.addEventListener("click", () => {
      const rows = [...body.rows], numeric = rows.every((row) => /^([-+]?\d.*|-?)$/.test(value(row)));
      const sign = { ascending: -1, descending: 1 }[heading.getAttribute("aria-sort")] ?? (numeric ? -1 : 1);
      const compare = (one, other) => (numeric ? figure(one) - figure(other) : value(one).localeCompare(value(other), "en"));
      const last = (row) => Number(numeric && isNaN(figure(row)));
      body.append(...rows.sort((one, other) => last(one) - last(other) || sign * (compare(one, other) || 0)));
      for (const cell of table.tHead.rows[0].cells) cell.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    });
    heading.replaceChildren(button);
  }
}

// Buttons and a box above a leaderboard, which show some of its rows.
function filters(card, page) {
  const rows = [...card.querySelectorAll("tbody tr")], box = node("input", { type: "search", placeholder: "method", "aria-label": "methods whose name holds" });
  const kinds = { "all": () => true, "ticked": ({ label }) => page.ticked.has(label), "may be the best": ({ ranks }) => ranks.average_accuracy[0] === 1 };
  const buttons = Object.keys(kinds).map((kind) => node("button", { type: "button", "aria-pressed": kind === "all" }, kind));
  // What diverged has a row and no figures.
  const own = rows.map((row, place) => page.methods[place] ?? { label: row.cells[0].textContent, ranks: { average_accuracy: [null] } });
  const apply = () => {
    const kind = buttons.find((button) => button.getAttribute("aria-pressed") === "true").textContent;
    rows.forEach((row, place) => { row.hidden = !(kinds[kind](own[place]) && own[place].label.includes(box.value)); });
  };
  for (const button of buttons)
    button.addEventListener("click", () => { buttons.forEach((other) => other.setAttribute("aria-pressed", other === button)); apply(); });
  box.addEventListener("input", apply);
  card.querySelector(".wide").before(node("div", { class: "controls" }, "show ", ...buttons, box));
  return apply;
}

// Tick boxes of the methods, with the colour and dashes of their lines.
function tickBoxes(page, redraw) {
  return page.methods.map(({ label }) => {
    const { colour, dash } = page.styles[label], box = node("input", { type: "checkbox", value: label });
    box.checked = page.ticked.has(label);
    box.addEventListener("change", () => { page.ticked[box.checked ? "add" : "delete"](label); redraw(); });
    const swatch = node("svg", { width: 22, height: 8, "aria-hidden": true }, line(0, 4, 22, 4, { stroke: colour, "stroke-width": 3, "stroke-dasharray": dash }));
    return node("label", {}, box, swatch, label);
  });
}

function start(article, page) {
  const sorted = page.methods.map(({ label }) => label).sort();
  page.styles = Object.fromEntries(sorted.map((label, place) => [label, { colour: COLOURS[place % COLOURS.length], dash: DASHES[Math.floor(place / COLOURS.length) % DASHES.length] }]));
  page.ticked = new Set(page.methods.slice(0, 6).map(({ label }) => label)); // the first of the leaderboard; more can be ticked
  page.measured = (...names) => names.filter((name) => page.methods.some(({ measures }) => known(measures[name][0])));
  const cards = Object.entries(FIGURES).map(([name, draw]) => {
    const card = article.querySelector(`section.${name}`);
    [card.controls, card.plot] = [node("div", { class: "controls" }), node("div", { class: "plot" })];
    card.querySelector("h3").after(card.controls, card.plot);
    card.draw = () => { card.plot.replaceChildren(); draw(card, page); };
    return card;
  });
  const apply = filters(article.querySelector("section.leaderboard"), page), redraw = () => { cards.forEach((card) => card.draw()); apply(); };
  article.querySelector("nav").append("Methods ", ...tickBoxes(page, redraw));
  redraw();
}

document.querySelectorAll("table").forEach(sortable);
const pages = JSON.parse(document.getElementById("figures").textContent);
document.querySelectorAll("article").forEach((article, place) => start(article, pages[place]));
