// Line charts in SVG. Everything shown is set as text; no markup is ever made from data.

const SVG = "http://www.w3.org/2000/svg";

function svg(name, attributes = {}, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") node.className = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const known = (value) => value !== null && value !== undefined;
const minus = (text) => text.replace("-", "\u2212");

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e9) return minus(`${+(value / 1e9).toPrecision(3)}\u202fG`);
  if (size >= 1e6) return minus(`${+(value / 1e6).toPrecision(3)}\u202fM`);
  if (size >= 1e4) return minus(`${+(value / 1e3).toPrecision(3)}\u202fk`);
  if (size !== 0 && size < 1e-3) return minus(value.toExponential(1));
  return minus(String(+value.toPrecision(3)));
}

const percent = (value) => minus(`${+(100 * value).toPrecision(3)}\u202f%`);

// Round tick values that cover [low, high].
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const values = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) {
    values.push(+(i * step).toPrecision(12));
  }
  return values;
}

// Centred Gaussian average over neighbouring points; it does not lag behind the values.
function smoothed(values) {
  const count = values.filter(known).length;
  if (count < 8) return values;
  const sigma = Math.max(1, count / 30);
  const reach = Math.ceil(3 * sigma);
  return values.map((value, centre) => {
    if (!known(value)) return null;
    let sum = 0;
    let weight = 0;
    const last = Math.min(values.length - 1, centre + reach);
    for (let i = Math.max(0, centre - reach); i <= last; i += 1) {
      if (!known(values[i])) continue;
      const w = Math.exp(-((i - centre) ** 2) / (2 * sigma * sigma));
      sum += w * values[i];
      weight += w;
    }
    return sum / weight;
  });
}

function extent(lines, spec) {
  const all = lines.flatMap((line) => [...line.y, ...(line.low ?? []), ...(line.high ?? [])]);
  const values = all.filter(known);
  if (!values.length) return [0, 1];
  let low = Math.min(...values);
  let high = Math.max(...values);
  if (spec.zero) {
    low = Math.min(low, 0);
    high = Math.max(high, 0);
  }
  if (spec.range) {
    low = Math.min(low, spec.range[0]);
    high = Math.max(high, spec.range[1]);
  }
  if (high - low < 1e-12) {
    const pad = Math.abs(high) * 0.1 || 1;
    return [spec.zero && low >= 0 ? 0 : low - pad, high + pad];
  }
  const pad = 0.06 * (high - low);
  const floor = spec.range ? spec.range[0] : spec.zero && low >= 0 ? 0 : low - pad;
  return [Math.min(floor, low), spec.range && high <= spec.range[1] ? spec.range[1] : high + pad];
}

const DASHES = ["", "7 4", "2 4", "9 3 2 3", "12 3"];

function swatch(line) {
  const box = svg("svg", { width: 20, height: 8, class: `c${line.colour % 7}`, "aria-hidden": "true" });
  const dash = DASHES[line.dash % 5] ?? "";
  box.append(svg("line", { x1: 1, x2: 19, y1: 4, y2: 4, class: "curve", "stroke-dasharray": dash }));
  return box;
}

// spec: {title, note, lines: [{name, colour, dash, run, x, y, low?, high?}], format, zero, range,
// points, xName, fractions (ticks between whole numbers)}. `view` holds what all charts share: {smooth, hiddenRuns}.
class Chart {
  constructor(spec, view) {
    this.spec = spec;
    this.view = view;
    this.hidden = new Set();
    this.at = -1;
    this.plot = svg("svg", { class: "plot", tabindex: 0, role: "img", "aria-label": this.summary() });
    this.tip = el("div", { class: "tip", role: "status", hidden: "" });
    this.node = el("figure", {},
      el("figcaption", {}, spec.title, spec.note ? el("span", { class: "hint" }, spec.note) : null),
      this.plot, this.tip, this.legend());
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerdown", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", () => this.show(-1));
    this.plot.addEventListener("blur", () => this.show(-1));
    this.plot.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => requestAnimationFrame(() => this.resize())).observe(this.node);
  }

  summary() {
    const ends = this.spec.lines.map((line) => {
      const values = line.y.filter(known);
      const format = this.spec.format ?? short;
      return `${line.name} from ${format(values[0])} to ${format(values[values.length - 1])}`;
    });
    return `${this.spec.title}: ${ends.join("; ")}. Arrow keys read out values.`;
  }

  legend() {
    if (this.spec.lines.length < 2) return null;
    const entries = this.spec.lines.map((line) => {
      const button = el("button", { type: "button", "aria-pressed": "true" }, swatch(line), line.name);
      button.addEventListener("click", () => {
        const hide = !this.hidden.has(line);
        if (hide) this.hidden.add(line);
        else this.hidden.delete(line);
        button.setAttribute("aria-pressed", String(!hide));
        this.draw();
      });
      return button;
    });
    return el("div", { class: "legend" }, ...entries);
  }

  resize() {
    const width = Math.max(220, Math.round(this.plot.getBoundingClientRect().width));
    if (width && width !== this.width) {
      this.width = width;
      this.draw();
    }
  }

  draw() {
    if (!this.width) return;
    const { spec, width } = this;
    const height = 190;
    const left = 46;
    const right = width - 8;
    const bottom = height - 24;
    const format = spec.format ?? short;
    this.lines = spec.lines.filter((l) => !this.hidden.has(l) && !this.view.hiddenRuns.has(l.run));
    const [low, high] = extent(this.lines, spec);
    const xs = [...new Set(this.lines.flatMap((l) => l.x.filter((_, i) => known(l.y[i]))))];
    this.steps = xs.sort((a, b) => a - b);
    const first = this.steps[0] ?? 0;
    const span = (this.steps[this.steps.length - 1] ?? 1) - first;
    this.toX = (x) => (span ? left + 6 + ((x - first) / span) * (right - left - 12) : (left + right) / 2);
    this.toY = (y) => bottom - ((y - low) / (high - low)) * (bottom - 8);
    const parts = [];
    for (const tick of ticks(low, high, 4)) {
      const y = this.toY(tick);
      parts.push(svg("line", { x1: left, x2: right, y1: y, y2: y, class: tick === 0 ? "grid zero" : "grid" }));
      parts.push(svg("text", { x: left - 6, y: y + 4, "text-anchor": "end", class: "axis" }, format(tick)));
    }
    const xTicks = span ? ticks(first, first + span, width > 320 ? 6 : 4).filter((tick) => spec.fractions || Number.isInteger(tick)) : [first];
    for (const tick of xTicks) {
      parts.push(svg("text", { x: this.toX(tick), y: height - 7, "text-anchor": "middle", class: "axis" }, short(tick)));
    }
    for (const line of this.lines) parts.push(this.drawLine(line));
    this.cross = svg("g");
    this.plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.plot.replaceChildren(...parts, this.cross);
  }

  drawLine(line) {
    const group = svg("g", { class: `c${line.colour % 7}` });
    const marks = this.spec.points || line.y.filter(known).length < 2;
    const smooth = this.view.smooth && !marks && line.y.filter(known).length >= 8;
    line.shown = smooth ? smoothed(line.y) : line.y;
    let path = "";
    line.shown.forEach((y, i) => {
      if (!known(y)) return;
      path += `${path ? "L" : "M"}${this.toX(line.x[i]).toFixed(1)} ${this.toY(y).toFixed(1)}`;
    });
    if (smooth) {
      // One path of zero-length strokes: far lighter than an element per point.
      const dots = line.y.map((y, i) => (known(y) ? `M${this.toX(line.x[i]).toFixed(1)} ${this.toY(y).toFixed(1)}h0` : ""));
      group.append(svg("path", { d: dots.join(""), class: "raw", "stroke-width": line.y.length > 200 ? 2.4 : 3.6 }));
    }
    group.append(svg("path", { d: path || "M0 0", class: "curve", "stroke-dasharray": DASHES[line.dash % 5] ?? "" }));
    if (marks) {
      line.y.forEach((y, i) => {
        if (!known(y)) return;
        const x = this.toX(line.x[i]);
        if (known(line.low?.[i])) {
          group.append(svg("line", { x1: x, x2: x, y1: this.toY(line.low[i]), y2: this.toY(line.high[i]), class: "whisker" }));
        }
        group.append(svg("circle", { cx: x, cy: this.toY(y), r: 3.5, class: "dot" }));
      });
    }
    return group;
  }

  point(event) {
    const box = this.plot.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * this.width;
    let best = -1;
    this.steps.forEach((step, i) => {
      if (best < 0 || Math.abs(this.toX(step) - x) < Math.abs(this.toX(this.steps[best]) - x)) best = i;
    });
    this.show(best);
  }

  key(event) {
    const last = this.steps.length - 1;
    const next = { ArrowLeft: Math.max(0, this.at - 1), ArrowRight: Math.min(last, this.at + 1), Home: 0, End: last, Escape: -1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    this.show(next);
  }

  show(index) {
    this.at = index;
    this.cross?.replaceChildren();
    this.tip.hidden = index < 0;
    if (index < 0) return;
    const step = this.steps[index];
    const x = this.toX(step);
    const format = this.spec.format ?? short;
    this.cross.append(svg("line", { x1: x, x2: x, y1: 8, y2: 166, class: "cross" }));
    const rows = [el("b", {}, `${this.spec.xName ?? "iteration"} ${short(step)}`)];
    for (const line of this.lines) {
      const i = line.x.indexOf(step);
      if (i < 0 || !known(line.y[i])) continue;
      const spread = known(line.low?.[i]) ? ` [${format(line.low[i])}, ${format(line.high[i])}]` : "";
      const mark = svg("circle", { cx: x, cy: this.toY(line.shown[i]), r: 4, class: `dot c${line.colour % 7}` });
      this.cross.append(mark);
      rows.push(el("div", {}, swatch(line), el("span", {}, line.name), el("span", {}, format(line.y[i]) + spread)));
    }
    this.tip.replaceChildren(...rows);
    const plot = this.plot.getBoundingClientRect();
    const wide = this.node.clientWidth;
    const at = plot.left - this.node.getBoundingClientRect().left + (x * plot.width) / this.width;
    this.tip.style.top = "3.2rem";
    this.tip.style.left = at < wide / 2 ? `${at + 12}px` : "auto";
    this.tip.style.right = at < wide / 2 ? "auto" : `${wide - at + 12}px`;
  }
}
