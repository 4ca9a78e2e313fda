// Scatter plots and heat-maps. A verdict shows as shape and colour: good up, flawed down.

const SHAPES = { good: "M0 -5L5 3.6H-5Z", flawed: "M0 5L5 -3.6H-5Z" };
const ROUND = "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0Z";
const verdictClass = (verdict) => (verdict === "good" || verdict === "flawed" ? `v-${verdict}` : "v-none");

// What scatter plots and heat-maps share: a figure with a read-out that follows pointer and keys.
class Plot {
  constructor(spec, area) {
    this.spec = spec;
    this.area = area;
    area.setAttribute("tabindex", "0");
    area.setAttribute("role", "img");
    this.tip = el("div", { class: "tip", role: "status", hidden: "" });
    this.node = el("figure", { class: spec.wide ? "wide" : "" },
      el("figcaption", {}, spec.title, spec.note ? el("span", { class: "hint" }, spec.note) : null),
      area, this.tip);
    area.addEventListener("pointermove", (event) => this.point(event));
    area.addEventListener("pointerdown", (event) => this.point(event));
    area.addEventListener("pointerleave", () => this.hide());
    area.addEventListener("blur", () => this.hide());
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.hide();
      else if (this.key(event.key)) event.preventDefault();
    });
    new ResizeObserver(() => requestAnimationFrame(() => this.resize())).observe(this.node);
  }

  resize() {
    const width = Math.max(200, Math.round(this.area.getBoundingClientRect().width));
    if (width && width !== this.width) {
      this.width = width;
      this.draw();
    }
  }

  // `x` and `y` are the place in the drawing, in its own units.
  tell(x, y, lines) {
    const [title, ...rest] = lines.filter(known);
    this.tip.hidden = false;
    this.tip.replaceChildren(el("b", {}, title), ...rest.map((line) => el("div", {}, el("span", {}, line))));
    const area = this.area.getBoundingClientRect();
    const box = this.node.getBoundingClientRect();
    const at = area.left - box.left + (x * area.width) / this.width;
    const wide = this.node.clientWidth;
    this.tip.style.top = `${Math.max(8, area.top - box.top + (y * area.width) / this.width - this.tip.offsetHeight - 12)}px`;
    this.tip.style.left = at < wide / 2 ? `${at + 12}px` : "auto";
    this.tip.style.right = at < wide / 2 ? "auto" : `${wide - at + 12}px`;
  }

  hide() {
    this.tip.hidden = true;
    this.mark?.replaceChildren();
  }
}

// spec: {title, note, points: [{x, y, verdict, low, high}], whiskers (from low to high), x, y (names), read(point) -> lines,
// identity (line y = x), balance (line y = -x), square, bare (no axes), root (axes of signed square roots)}
class Scatter extends Plot {
  constructor(spec) {
    super(spec, svg("svg", { class: "plot" }));
    this.at = -1;
    this.area.setAttribute("aria-label", `${spec.title}: ${spec.points.length} points. Arrow keys read them out.`);
  }

  replace(points) {
    this.spec.points = points;
    this.hide();
    this.draw();
  }

  bounds(values) {
    const all = values.filter(known);
    let low = Math.min(0, ...all);
    let high = Math.max(0, ...all);
    if (this.spec.bare) [low, high] = [Math.min(...all), Math.max(...all)];
    const pad = 0.06 * (high - low) || 1;
    return [low - pad, high + pad];
  }

  draw() {
    if (!this.width) return;
    const { spec, width } = this;
    const height = spec.square ? Math.min(width, 320) : 220;
    const [left, right, top, bottom] = spec.bare ? [6, width - 6, 6, height - 6] : [50, width - 8, 8, height - (spec.ranked ? 8 : 34)];
    this.points = spec.points.filter((p) => known(p.x) && known(p.y)).sort((a, b) => a.x - b.x || a.y - b.y);
    let [x0, x1] = this.bounds(this.points.map((p) => p.x));
    let [y0, y1] = this.bounds(this.points.flatMap((p) => (spec.whiskers ? [p.low, p.high] : [p.y])));
    if (spec.identity) [x0, x1, y0, y1] = [Math.min(x0, y0), Math.max(x1, y1), Math.min(x0, y0), Math.max(x1, y1)];
    const bend = spec.root ? (v) => Math.sign(v) * Math.sqrt(Math.abs(v)) : (v) => v;
    const part = (v, low, high) => (bend(v) - bend(low)) / (bend(high) - bend(low));
    this.toX = (x) => left + part(x, x0, x1) * (right - left);
    this.toY = (y) => bottom - part(y, y0, y1) * (bottom - top);
    const parts = spec.bare ? [] : this.axes(x0, x1, y0, y1, left, right, top, bottom, height);
    const line = (x, y, xx, yy) => svg("line", { x1: this.toX(x), y1: this.toY(y), x2: this.toX(xx), y2: this.toY(yy), class: "rule" });
    if (spec.identity) parts.push(line(x0, x0, x1, x1));
    if (spec.balance) {
      const reach = Math.min(Math.max(-x0, x1), Math.max(-y0, y1));
      parts.push(line(Math.max(x0, -y1, -reach), -Math.max(x0, -y1, -reach), Math.min(x1, -y0, reach), -Math.min(x1, -y0, reach)));
    }
    const order = { good: 1, flawed: 2 };
    const drawn = [...this.points].sort((a, b) => (order[a.verdict] ?? 0) - (order[b.verdict] ?? 0));
    for (const p of drawn) {
      const group = svg("g", { class: verdictClass(p.verdict) });
      if (spec.whiskers) group.append(svg("line", { x1: this.toX(p.x), x2: this.toX(p.x), y1: this.toY(p.low), y2: this.toY(p.high), class: "whisker" }));
      group.append(svg("path", { d: SHAPES[p.verdict] ?? ROUND, transform: `translate(${this.toX(p.x).toFixed(1)} ${this.toY(p.y).toFixed(1)})`, class: "spot" }));
      parts.push(group);
    }
    this.mark = svg("g");
    this.area.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.height = height;
    this.area.replaceChildren(...parts, this.mark);
  }

  axes(x0, x1, y0, y1, left, right, top, bottom, height) {
    const parts = [];
    for (const tick of ticks(y0, y1, 4)) {
      const y = this.toY(tick);
      parts.push(svg("line", { x1: left, x2: right, y1: y, y2: y, class: tick === 0 ? "grid zero" : "grid" }));
      parts.push(svg("text", { x: left - 6, y: y + 4, "text-anchor": "end", class: "axis" }, short(tick)));
    }
    if (this.spec.ranked) return parts;
    for (const tick of ticks(x0, x1, right - left > 330 ? 5 : 3)) {
      const x = this.toX(tick);
      parts.push(svg("line", { x1: x, x2: x, y1: top, y2: bottom, class: tick === 0 ? "grid zero" : "grid" }));
      parts.push(svg("text", { x, y: bottom + 15, "text-anchor": "middle", class: "axis" }, short(tick)));
    }
    parts.push(svg("text", { x: right, y: height - 3, "text-anchor": "end", class: "axis" }, `${this.spec.x} \u2192`));
    return parts;
  }

  point(event) {
    const box = this.area.getBoundingClientRect();
    const scale = this.width / box.width;
    const [x, y] = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
    let best = -1;
    let nearest = Infinity;
    this.points.forEach((p, i) => {
      const far = (this.toX(p.x) - x) ** 2 + (this.toY(p.y) - y) ** 2;
      if (far < nearest) [best, nearest] = [i, far];
    });
    this.show(best);
  }

  key(name) {
    const last = this.points.length - 1;
    const next = { ArrowLeft: Math.max(0, this.at - 1), ArrowRight: Math.min(last, this.at + 1), Home: 0, End: last }[name];
    if (next === undefined || last < 0) return false;
    this.show(next);
    return true;
  }

  show(index) {
    this.at = index;
    const p = this.points[index];
    if (!p) return this.hide();
    this.mark.replaceChildren(svg("circle", { cx: this.toX(p.x), cy: this.toY(p.y), r: 8, class: "ring" }));
    return this.tell(this.toX(p.x), this.toY(p.y), this.spec.read(p));
  }
}

// spec: {title, note, samples: [{name, verdict, task}], rows: lower triangle in percent}
class HeatMap extends Plot {
  constructor(spec) {
    const canvas = el("canvas", { class: "heat" });
    super(spec, canvas);
    this.canvas = canvas;
    this.size = spec.samples.length;
    this.at = [0, 0];
    canvas.setAttribute("aria-label", `${spec.title}: ${this.size} by ${this.size} samples. Arrow keys read out pairs.`);
    this.node.append(el("div", { class: "scale", "aria-hidden": "true" }, "\u22121", el("span", { class: "ramp" }), "+1"));
  }

  cell(i, j) {
    return this.spec.rows[Math.max(i, j)][Math.min(i, j)];
  }

  // Colours come from the style sheet, so that themes hold here too.
  colour(name) {
    const text = getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    return [1, 3, 5].map((at) => parseInt(text.slice(at, at + 2), 16));
  }

  draw() {
    if (!this.width || !this.size) return;
    const { canvas, size, width } = this;
    const sharp = window.devicePixelRatio || 1;
    const [ground, up, down] = [this.colour("--panel"), this.colour("--plus"), this.colour("--minus")];
    const pixels = new ImageData(size, size);
    for (let i = 0; i < size; i += 1) {
      for (let j = 0; j < size; j += 1) {
        const value = (this.cell(i, j) ?? 0) / 100;
        const part = Math.min(1, Math.abs(value)) ** 0.6; // small cosines are the many, and matter
        const tone = value > 0 ? up : down;
        for (let k = 0; k < 3; k += 1) pixels.data[4 * (i * size + j) + k] = ground[k] + part * (tone[k] - ground[k]);
        pixels.data[4 * (i * size + j) + 3] = 255;
      }
    }
    const small = document.createElement("canvas");
    small.width = size;
    small.height = size;
    small.getContext("2d").putImageData(pixels, 0, 0);
    canvas.width = width * sharp;
    canvas.height = width * sharp;
    const pen = canvas.getContext("2d");
    pen.scale(sharp, sharp);
    pen.imageSmoothingEnabled = false;
    this.from = 10;
    this.step = (width - this.from) / size;
    pen.drawImage(small, this.from, this.from, width - this.from, width - this.from);
    const css = (name) => `rgb(${this.colour(name).join(" ")})`;
    const paint = { good: css("--good"), flawed: css("--flawed") };
    this.spec.samples.forEach((sample, i) => {
      pen.fillStyle = paint[sample.verdict] ?? css("--soft");
      pen.fillRect(0, this.from + i * this.step, 5, this.step + 0.5);
      pen.fillRect(this.from + i * this.step, 0, this.step + 0.5, 5);
      if (!i || this.spec.samples[i - 1].verdict === sample.verdict) return;
      pen.fillStyle = css("--ink");
      pen.fillRect(this.from, this.from + i * this.step - 0.5, width, 1);
      pen.fillRect(this.from + i * this.step - 0.5, this.from, 1, width);
    });
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const scale = this.width / box.width;
    const place = (value) => Math.floor((value * scale - this.from) / this.step);
    this.show(place(event.clientY - box.top), place(event.clientX - box.left));
  }

  key(name) {
    const [down, right] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[name] ?? [0, 0];
    if (!down && !right) return false;
    this.show(this.at[0] + down, this.at[1] + right);
    return true;
  }

  show(i, j) {
    if (!(i >= 0 && j >= 0 && i < this.size && j < this.size)) {
      this.hide();
      return;
    }
    this.at = [i, j];
    const value = this.cell(i, j);
    const say = (sample) => `${sample.name} (${[sample.verdict ?? "no label", sample.kind].filter(Boolean).join(", ")}; ${sample.task})`;
    this.tell(this.from + (j + 0.5) * this.step, this.from + i * this.step,
      [`cosine ${known(value) ? short(value / 100) : "unknown"}`, say(this.spec.samples[i]), say(this.spec.samples[j])]);
  }
}
