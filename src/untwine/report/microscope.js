// The plots of the microscope, filled into the places that the template left for them.

const PAIRS = { "good-good": 0, "good-flawed": 3, "flawed-flawed": 1 };
const STILL = { smooth: false, hiddenRuns: new Set() };
const nats = (value) => (known(value) ? `${value > 0 ? "+" : ""}${short(value)}` : "\u2013");
const tagged = (p) => `${p.verdict ?? "no label"}${p.kind ? `, ${p.kind}` : ""}`;

function truthPlots(truths) {
  return truths.flatMap((truth) => {
    const name = truths.length > 1 ? `, iteration ${truth.iteration}` : "";
    const confidence = short(100 * (1 - (truth.settings?.error ?? 0.05)));
    const rows = truth.rows.map((row) => ({ ...row, verdict: row.label, y: row.advantage }))
      .sort((a, b) => a.advantage - b.advantage);
    const read = (p) => [p.name, `A* ${nats(p.advantage)} [${short(p.low)}, ${short(p.high)}], ${p.label}`, p.kind, `\u03c0 = ${short(p.q)}, ${p.n} pairs of branches`];
    const some = truth.of > rows.length ? ` ${rows.length} of ${truth.of}, spread evenly.` : "";
    return [
      new Scatter({ title: `True advantage of each step${name}`, note: `from worst to best, with ${confidence} % intervals.${some}`, ranked: true, whiskers: true, points: rows.map((row, x) => ({ ...row, x })), read }),
      new Scatter({ title: `True advantage and probability${name}`, note: "|A*| cannot be above 1 \u2212 \u03c0: what is done nearly always looks harmless", x: "\u03c0(a|s)", points: rows.map((row) => ({ ...row, x: row.q })), read }),
    ];
  });
}

// Histograms as lines, one chart per relation of the two samples.
function cosineCharts(histograms) {
  const relations = [...new Set(histograms.map((h) => h.relation))];
  return relations.map((relation) => {
    const lines = histograms.filter((h) => h.relation === relation && h.pairs > 0).map((h) => ({
      name: `${h.kind} (${h.pairs}${known(h.mean) ? `, mean ${short(h.mean)}` : ""})`,
      colour: PAIRS[h.kind] ?? 6, dash: Object.keys(PAIRS).indexOf(h.kind),
      x: h.counts.map((_, i) => +(-1 + (2 * i + 1) / h.counts.length).toPrecision(6)), y: h.counts.map((count) => count / h.pairs),
    }));
    const note = { "same state": "both samples in the same state", "same command": "same command, other state", "same task": "same task instance, other state and command", other: "nothing in common" }[relation];
    return { title: `Cosines, ${relation}`, note: `${note ?? ""}; share of pairs`, lines, zero: true, format: percent, xName: "cosine", fractions: true };
  }).filter((spec) => spec.lines.length).map((spec) => new Chart(spec, STILL));
}

function couplingPlots(coupling) {
  const plots = [];
  if (coupling.heat) {
    const some = coupling.heat.of > coupling.heat.samples.length ? ` ${coupling.heat.samples.length} of ${coupling.heat.of} samples, spread evenly.` : "";
    plots.push(new HeatMap({ title: "Gradient coupling of every pair", note: `cosine of two samples\u2019 gradients, in blocks by verdict, then task and state.${some}`, ...coupling.heat }));
  }
  const read = (p) => [p.name, `${tagged(p)}; ${p.task}`, `self ${nats(p.own)}, coupled ${nats(p.coupled)}, \u0394 ${nats(p.delta)}`, `weight ${nats(p.weight)}, log \u03c0 ${short(p.logprob)}`];
  plots.push(new Scatter({
    title: "Self and coupled push", note: "right of the line \u0394 > 0: a flawed step there is lifted, whatever its own advantage says; axes of square roots",
    x: "self", square: true, balance: true, root: true, read, points: coupling.points.map((p) => ({ ...p, x: p.own, y: p.coupled })),
  }));
  if (coupling.points.some((p) => known(p.predicted))) {
    plots.push(new Scatter({
      title: "Predicted against measured change", note: "of log \u03c0 after one real small step, upwards; on the line the prediction is right",
      x: "predicted", square: true, identity: true, points: coupling.points.map((p) => ({ ...p, x: p.predicted, y: p.measured })),
      read: (p) => [p.name, tagged(p), `predicted ${nats(p.predicted)}, measured ${nats(p.measured)}`],
    }));
  }
  return plots;
}

function layerChart(title, note, layers, keys, rest) {
  const lines = Object.entries(keys).filter(([key]) => layers.some((row) => known(row[key]))).map(([key, name], i) => ({
    name, colour: name.startsWith("shuffled") || name.startsWith("constant") ? 6 : i, dash: i, x: layers.map((row) => row.layer), y: layers.map((row) => row[key]),
  }));
  return lines.length ? [new Chart({ title, note, lines, xName: "layer", ...rest }, STILL)] : [];
}

function separationPlots(separation) {
  const { layers } = separation;
  const plots = separation.maps && layers.length ? [layerMap(separation)] : [];
  return plots.concat(
    layerChart("Probe by layer", "accuracy on tasks it has not seen; balanced 50 % is chance", layers, { balanced: "balanced", accuracy: "accuracy", majority: "constant answer" }, { range: SHARE, format: percent }),
    layerChart("Silhouette by layer", "above the shuffled labels: the classes are apart", layers, { silhouette: "silhouette", silhouette_shuffled: "shuffled labels" }, { zero: true }),
    layerChart("Centroid margin by layer", "distance of the centroids in units of the spread", layers, { margin: "margin", margin_shuffled: "shuffled labels" }, { zero: true }),
  );
}

function layerMap(separation) {
  const { layers, samples, maps } = separation;
  const place = (at) => maps[at].map(([x, y], i) => ({ ...samples[i], x, y }));
  const known_ = layers.map((row, i) => [row.balanced ?? -1, i]);
  const best = known_.reduce((a, b) => (b[0] > a[0] ? b : a))[1];
  const some = separation.of > samples.length ? ` ${samples.length} of ${separation.of} samples.` : "";
  const map = new Scatter({
    title: "Map of the hidden states", note: `first two principal components of a layer.${some}`, bare: true, square: true,
    points: place(best), read: (p) => [p.name, `${tagged(p)}; ${p.task}`],
  });
  const label = el("output", {});
  const slide = el("input", { type: "range", min: 0, max: layers.length - 1, value: best, "aria-label": "Layer of the map" });
  const say = () => {
    const row = layers[Number(slide.value)];
    const shown = row.variance_shown.filter(known).reduce((a, b) => a + b, 0);
    label.replaceChildren(`layer ${row.layer}${known(row.balanced) ? `, probe ${percent(row.balanced)}` : ""}, ${percent(shown)} of the variance`);
  };
  slide.addEventListener("input", () => {
    map.replace(place(Number(slide.value)));
    say();
  });
  say();
  map.node.append(el("label", { class: "slide" }, slide, label));
  return map;
}

function showMicroscope(runs) {
  const make = {
    truth: (m) => truthPlots(m.truth),
    coupling: (m) => couplingPlots(m.coupling),
    cosines: (m) => cosineCharts(m.coupling.cosines),
    separation: (m) => separationPlots(m.separation),
  };
  const maps = [];
  for (const place of document.querySelectorAll("#microscope .plots")) {
    const plots = make[place.dataset.topic](runs[Number(place.dataset.run)].microscope);
    place.append(...plots.map((plot) => plot.node));
    plots.forEach((plot) => plot.resize());
    maps.push(...plots.filter((plot) => plot instanceof HeatMap));
  }
  const redraw = () => requestAnimationFrame(() => maps.forEach((map) => map.draw()));
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  new MutationObserver(redraw).observe(document.documentElement, { attributeFilter: ["data-theme"] });
}
