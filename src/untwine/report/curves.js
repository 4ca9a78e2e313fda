// Which curves the page shows, in which order. One run: a colour per series. Several runs: a colour
// per run and a dash per series, so runs can be told apart in every chart.

const SHARE = [0, 1];
const RL_CHARTS = [
  ["How well it does",
    { title: "Outcome", note: "mean return of the sampled episodes", keys: { outcome_mean: "outcome" }, range: SHARE },
    { title: "Success rate", note: "sampled training episodes", keys: { success_rate: "success" }, range: SHARE, format: percent },
    { title: "Episode length", note: "steps", keys: { episode_length: "length" }, zero: true }],
  ["What goes wrong",
    { title: "Flawed and invalid steps", note: "share of all steps", keys: { flawed_rate: "flawed", invalid_rate: "invalid" }, format: percent, zero: true, colours: [1, 3] },
    { title: "Advantage of good and flawed steps", note: "mean per step; flawed should lie below good", keys: { advantage_good: "good", advantage_flawed: "flawed" }, zero: true },
    { kinds: true, title: "Kinds of flawed steps", note: "share of all steps", format: percent, zero: true }],
  ["Learning",
    { title: "Policy loss", keys: { policy_loss: "policy loss" } },
    { title: "GCD loss", keys: { gcd_loss: "GCD loss" }, zero: true },
    { title: "Verdict accuracy", note: "share of verdicts that are right; half is chance", keys: { verdict_accuracy: "accuracy" }, range: SHARE, format: percent },
    { title: "Gradient of GCD", note: "norm of its part of the step, policy's = 1; above 1 the step is mostly about verdicts", keys: { gcd_ratio: "ratio" }, zero: true },
    { title: "Weight of GCD", keys: { gcd_weight: "weight" }, zero: true, varying: true }],
  ["Stability",
    { title: "Entropy", note: "nats per token; near zero the policy no longer explores", keys: { entropy: "entropy" }, zero: true },
    { title: "KL to the initial policy", note: "nats per token", keys: { kl: "KL" }, zero: true },
    { title: "Clip fraction", note: "share of tokens outside the clip range", keys: { clip_fraction: "clipped" }, zero: true, format: percent },
    { title: "Gradient norm", note: "before clipping", keys: { grad_norm: "norm" }, zero: true },
    { title: "Largest probability ratio", keys: { ratio_max: "ratio" } },
    { title: "Groups kept", note: "groups with spread in their outcomes", keys: { groups_kept: "groups" }, zero: true }],
  ["Diagnosis during training",
    { title: "Probability of the probes", note: "mean of fixed (state, action) pairs", keys: { probe_good: "good", probe_flawed: "flawed", probe_unsampled: "never sampled" }, zero: true },
    { title: "Log-probability of the probes", note: "nats", keys: { probe_logprob_good: "good", probe_logprob_flawed: "flawed", probe_logprob_unsampled: "never sampled" } },
    { title: "Rank of the probes", note: "among the replies of their state; 1 is the likeliest", keys: { probe_rank_good: "good", probe_rank_flawed: "flawed", probe_rank_unsampled: "never sampled" } },
    { title: "Mass on the likeliest reply", note: "in the states of the probes", keys: { probe_argmax_good: "good", probe_argmax_flawed: "flawed", probe_argmax_unsampled: "never sampled" }, range: SHARE },
    { title: "Miscalibration", note: "share of steps labelled flawed by their group whose advantage is positive", keys: { miscalibration: "miscalibrated" }, range: SHARE, format: percent },
    { title: "Reinforced though flawed", note: "beside permuted weights", keys: { reinforced: "measured", reinforced_null: "permuted" }, range: SHARE, format: percent },
    { title: "Push on flawed samples", note: "nats, where the largest change is 0.01", keys: { push_self_flawed: "own", push_coupled_flawed: "coupled" }, zero: true },
    { title: "Cosine coupling", note: "mean by pair kind", keys: { cosine_good_good: "good-good", cosine_good_flawed: "good-flawed", cosine_flawed_flawed: "flawed-flawed" }, zero: true }],
  ["Cost",
    { title: "Tokens per iteration", keys: { policy_tokens: "policy", gcd_tokens: "verdicts" }, zero: true },
    { title: "Seconds per iteration", keys: { seconds_rollout: "rollout", seconds_update: "update", seconds_gcd: "GCD", seconds_diagnose: "diagnosis" }, zero: true },
    { title: "Environment steps per iteration", keys: { env_steps: "steps" }, zero: true },
    { title: "Episodes lost", note: "given up by the environment", keys: { episodes_lost: "lost" }, zero: true, varying: true }],
];
const COLD_CHARTS = ["Cold start",
  { title: "Imitation loss", keys: { loss: "loss" }, zero: true, xName: "step" },
  { title: "Verdict accuracy", note: "on verdict data", keys: { verdict_accuracy: "accuracy" }, range: SHARE, format: percent, xName: "step" }];

// Keys this page does not know by name, one chart for those that share what stands before the last "/".
const MICROSCOPE_KEYS = /^(diagnose|probe|calibration|coupling|gram|truth|flawed|squeez)/;

const CORRECTION_KEYS = /^correction_/;

// Correction by prompt: every kind with the sentences and without, and when they were on.
function correctionSpecs(runs) {
  const keys = [...new Set(runs.flatMap((run) => run.others))].filter((key) => CORRECTION_KEYS.test(key));
  if (!keys.length) return [];
  const after = (start) => keys.filter((key) => key.startsWith(start)).map((key) => key.slice(start.length));
  const kinds = [...new Set([...after("correction_on/"), ...after("correction_plain/"), ...after("correction_told/")])];
  const both = (plain, told) => ({ [plain]: "told nothing", [told]: "told" });
  return [
    { title: "Sentences on", note: "1: the sentence against this kind was shown", keys: Object.fromEntries(after("correction_on/").map((kind) => [`correction_on/${kind}`, kind])), range: SHARE },
    { title: "Groups told", note: "share of the groups", keys: { correction_share: "told" }, range: SHARE, format: percent },
    { title: "Success in training", note: "with and without being told", keys: both("correction_success/plain", "correction_success/told"), range: SHARE, format: percent },
    ...kinds.map((kind) => ({ title: `Flawed: ${kind}`, note: "share of steps, with and without being told", keys: both(`correction_plain/${kind}`, `correction_told/${kind}`), zero: true, format: percent })),
  ];
}

function otherSpecs(runs) {
  const specs = new Map();
  for (const key of new Set(runs.flatMap((run) => run.others))) {
    if (CORRECTION_KEYS.test(key)) continue;
    const cut = key.lastIndexOf("/");
    const [title, name] = cut > 0 ? [key.slice(0, cut), key.slice(cut + 1)] : [key, key];
    if (!specs.has(title)) specs.set(title, { title: title.replaceAll("_", " "), keys: {}, key: title });
    specs.get(title).keys[key] = name.replaceAll("_", " ");
  }
  return [...specs.values()];
}

function linesOf(runs, stage, spec) {
  const lines = [];
  runs.forEach((run, runIndex) => {
    Object.entries(spec.keys).forEach(([key, name], keyIndex) => {
      const y = run[stage][key];
      if (!y || (spec.varying && new Set(y.filter(known)).size < 2)) return;
      const several = runs.length > 1;
      const keyCount = Object.keys(spec.keys).length;
      lines.push({
        name: several ? (keyCount > 1 ? `${run.label}: ${name}` : run.label) : name,
        colour: several ? runIndex : spec.colours?.[keyIndex] ?? keyIndex,
        dash: several || keyCount > 1 ? keyIndex : 0,
        run: run.label, x: run[stage].step, y,
      });
    });
  });
  return lines;
}

// Kinds have too many lines to lay runs over each other: each run gets a chart of its own.
function kindCharts(runs, spec) {
  return runs.filter((run) => run.kinds.length).map((run) => ({
    ...spec,
    title: runs.length > 1 ? `${spec.title}: ${run.label}` : spec.title,
    lines: run.kinds.filter((kind) => run.rl[`kind:${kind}`]).map((kind, index) => ({
      name: kind, colour: index, dash: index, run: run.label, x: run.rl.step, y: run.rl[`kind:${kind}`],
    })),
  }));
}

function evaluationCharts(runs) {
  const sets = [...new Set(runs.flatMap((run) => run.evaluate.map((row) => row.set)))].sort();
  const charts = [];
  for (const set of sets) {
    const lines = runs.map((run, index) => {
      const rows = run.evaluate
        .filter((row) => row.set === set && known(row.success_rate))
        .map((row) => ({ ...row, step: row.phase === "cold_start" ? 0 : row.step }))
        .sort((a, b) => a.step - b.step);
      return {
        name: runs.length > 1 ? run.label : "success", colour: index, dash: 0, run: run.label,
        x: rows.map((row) => row.step), y: rows.map((row) => row.success_rate),
        low: rows.map((row) => row.success_interval?.[0]), high: rows.map((row) => row.success_interval?.[1]),
      };
    }).filter((line) => new Set(line.x).size > 1);
    if (lines.length) charts.push({ title: `Evaluation on ${set}`, note: "success rate with 95 % intervals", lines, points: true, range: SHARE, format: percent });
  }
  return charts;
}

function section(title, specs, view, charts) {
  const grid = el("div", { class: "charts" });
  const missing = [];
  for (const spec of specs) {
    if (!spec.lines.length) {
      if (!spec.varying) missing.push(spec.title);
      continue;
    }
    const chart = new Chart(spec, view);
    charts.push(chart);
    grid.append(chart.node);
  }
  if (!grid.children.length) return null;
  const note = missing.length ? el("p", { class: "hint" }, `Not recorded: ${missing.join(", ")}.`) : null;
  return el("div", {}, el("h3", {}, title), grid, note);
}

function showCurves(runs) {
  const view = { smooth: true, hiddenRuns: new Set() };
  const charts = [];
  const root = document.getElementById("charts");
  const sections = [section("Evaluations during training", evaluationCharts(runs), view, charts)];
  for (const [title, ...specs] of RL_CHARTS) {
    const full = specs.flatMap((spec) => (spec.kinds
      ? kindCharts(runs, spec).concat(runs.some((run) => run.kinds.length) ? [] : [{ ...spec, lines: [] }])
      : [{ ...spec, lines: linesOf(runs, "rl", spec) }]));
    sections.push(section(title, full, view, charts));
  }
  const correction = correctionSpecs(runs).map((spec) => ({ ...spec, lines: linesOf(runs, "rl", spec) }));
  sections.push(section("Correction by prompt", correction, view, charts));
  const [title, ...cold] = COLD_CHARTS;
  sections.push(section(title, cold.map((spec) => ({ ...spec, lines: linesOf(runs, "cold_start", spec) })), view, charts));
  const [others, measured] = [[], []];
  for (const spec of otherSpecs(runs)) {
    (MICROSCOPE_KEYS.test(spec.key) ? measured : others).push({ ...spec, lines: linesOf(runs, "rl", spec) });
  }
  sections.push(section("Microscope during training", measured, view, charts));
  const more = section("More numbers", others, view, charts);
  root.append(...sections.filter(Boolean));
  if (more) root.append(el("details", {}, el("summary", {}, "Everything else that was recorded"), more));
  charts.forEach((chart) => chart.resize());
  const long = runs.filter((run) => run.rl.step && run.points > run.rl.step.length);
  for (const run of long) {
    root.append(el("p", { class: "hint" }, `${run.label}: ${run.points} iterations are shown as ${run.rl.step.length} averages of neighbours.`));
  }
  if (!charts.length) {
    root.append(el("p", { class: "empty" }, "No training step was recorded, so there are no curves."));
    return;
  }
  const redraw = () => charts.forEach((chart) => chart.draw());
  document.getElementById("curve-controls").hidden = false;
  const smooth = document.getElementById("smooth");
  smooth.addEventListener("change", () => {
    view.smooth = smooth.checked;
    redraw();
  });
  if (runs.length < 2) return;
  document.getElementById("run-legend").append(...runs.map((run, index) => {
    const button = el("button", { type: "button", "aria-pressed": "true" }, swatch({ colour: index, dash: 0 }), run.label);
    button.addEventListener("click", () => {
      const hide = !view.hiddenRuns.has(run.label);
      if (hide) view.hiddenRuns.add(run.label);
      else view.hiddenRuns.delete(run.label);
      button.setAttribute("aria-pressed", String(!hide));
      redraw();
    });
    return button;
  }));
}
