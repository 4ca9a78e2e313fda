// The episode browser: a filtered list on one side, one episode step by step on the other.

const FOLD = 320; // texts longer than this are folded

function option(value, text) {
  return el("option", { value }, text);
}

function select(label, choices) {
  return el("select", { "aria-label": label }, ...choices.map(([value, text]) => option(value, text)));
}

function haystack(episode) {
  const steps = episode.steps.flatMap((s) => [s.observation, s.thought, s.command, s.raw, s.invalid, s.feedback, ...(s.labels ?? []).map((l) => l.kind)]);
  return [episode.goal, episode.ref, ...steps].filter(Boolean).join("\n").toLowerCase();
}

function verdictOf(step) {
  const labels = step.labels ?? [];
  if (labels.some((label) => label.verdict === "flawed")) return "flawed";
  return labels.length ? "good" : "";
}

const MARK = { good: "\u25b2", flawed: "\u25bc", "": "\u00b7" };

const sign = (value) => (Math.abs(value) < 1e-7 ? "0" : value > 0 ? `+${short(value)}` : short(value));

// What steps can be coloured by. `of` gives the value of a step, null where it is not known.
const SHADES = {
  labels: { name: "labels", says: "\u25b2 good, \u25bc flawed, by the labels on record" },
  truth: { name: "A* (truth)", of: (step) => step.truth?.advantage, says: "\u25b2 better, \u25bc worse than what the policy does there on average; \u25cb no difference, ? not clear yet, \u00b7 not judged" },
  advantage: { name: "advantage", of: (step) => step.advantage, says: "\u25b2 credit above, \u25bc below zero; stronger colour, larger value" },
  push: { name: "coupled push", of: (step) => step.push?.coupled, says: "\u25b2 other samples lift this action, \u25bc lower it; stronger colour, larger push" },
};

class Browser {
  constructor(root, data) {
    this.root = root;
    this.runs = data.runs;
    this.all = data.episodes;
    this.all.forEach((episode, i) => { episode.key = i; });
    this.biggest = Math.max(1e-9, ...this.all.flatMap((e) => e.steps.map((s) => Math.abs(s.advantage ?? 0))));
    const known_ = (shade) => shade === "labels" || this.all.some((e) => e.steps.some((s) => known(SHADES[shade].of(s))));
    this.shades = Object.keys(SHADES).filter(known_);
    this.shade = this.shades.includes("truth") ? "truth" : "labels";
    this.tops = {};
    for (const shade of this.shades.slice(1)) {
      this.tops[shade] = Math.max(1e-12, ...this.all.flatMap((e) => e.steps.map((s) => Math.abs(SHADES[shade].of(s) ?? 0))));
    }
    this.list = el("ol", { class: "list", "aria-label": "Episodes" });
    this.detail = el("article", { "aria-live": "polite", "aria-label": "Episode" });
    this.count = el("p", { class: "note", role: "status" });
    this.root.append(this.filters(), this.switch(), this.count, el("div", { class: "browse" }, this.list, this.detail));
    document.addEventListener("keydown", (event) => this.key(event));
    this.filter();
  }

  filters() {
    const unique = (of) => [...new Set(this.all.map(of))];
    const iterations = unique((e) => e.iteration).sort((a, b) => a - b);
    this.run = select("Run", [["", "All runs"], ...this.runs.map((r, i) => [i, r.label])]);
    this.iteration = select("Iteration", [["", "All iterations"], ...iterations.map((i) => [i, `Iteration ${i}`])]);
    this.task = select("Task", [["", "All tasks"], ...unique((e) => e.task).sort().map((t) => [`=${t}`, t])]);
    this.ending = select("Success", [["", "Any ending"], ["yes", "Success"], ["no", "No success"]]);
    this.flawed = el("input", { type: "checkbox" });
    this.judged = el("input", { type: "checkbox" });
    this.text = el("input", { type: "search", placeholder: "Search goals, texts, commands", "aria-label": "Search" });
    for (const input of [this.run, this.iteration, this.task, this.ending, this.flawed, this.judged]) {
      input.addEventListener("change", () => this.filter());
    }
    this.text.addEventListener("input", () => this.filter());
    return el("div", { class: "filters" }, this.runs.length > 1 ? this.run : null, this.iteration, this.task, this.ending,
      el("label", {}, this.flawed, "with a flawed step"),
      this.shades.length > 2 ? el("label", {}, this.judged, "with a measured step") : null, this.text);
  }

  switch() {
    if (this.shades.length < 2) return "";
    this.says = el("span", { class: "hint" });
    this.buttons = this.shades.map((shade) => el("input", {
      type: "radio", name: "shade", value: shade, onchange: () => this.paint(shade),
    }));
    const labels = this.buttons.map((button, i) => el("label", {}, button, SHADES[this.shades[i]].name));
    this.paint(this.shade);
    return el("fieldset", { class: "shades" }, el("legend", {}, "Steps coloured by"), ...labels, this.says);
  }

  paint(shade) {
    this.shade = shade;
    this.buttons.forEach((button) => { button.checked = button.value === shade; });
    this.says.replaceChildren(SHADES[shade].says);
    if (this.current) this.open(this.current);
  }

  // Classes and mark of a step under the chosen shade.
  tone(step) {
    if (this.shade === "labels") return { look: verdictOf(step), mark: MARK[verdictOf(step)], says: verdictOf(step) };
    const value = SHADES[this.shade].of(step);
    if (!known(value)) return { look: "", mark: MARK[""], says: "not measured" };
    const says = `${SHADES[this.shade].name} ${sign(value)}`;
    const side = value > 0 ? "above" : "below";
    let strength = Math.min(3, Math.max(1, Math.ceil((3 * Math.abs(value)) / this.tops[this.shade])));
    if (this.shade === "truth") {
      if (step.truth.label === "neutral") return { look: "judged", mark: step.truth.clear ? "\u25cb" : "?", says: `${says}, ${step.truth.clear ? "neutral" : "not clear yet"}` };
      strength = Math.max(2, strength);
    }
    if (!value) return { look: "", mark: "\u25cb", says };
    return { look: `${side} ${this.shade} t${strength}`, mark: value > 0 ? MARK.good : MARK.flawed, says };
  }

  filter() {
    const words = this.text.value.trim().toLowerCase();
    this.shown = this.all.filter((episode) =>
      (this.run.value === "" || episode.run === Number(this.run.value))
      && (this.iteration.value === "" || episode.iteration === Number(this.iteration.value))
      && (this.task.value === "" || `=${episode.task}` === this.task.value)
      && (this.ending.value === "" || episode.success === (this.ending.value === "yes"))
      && (!this.flawed.checked || episode.flawed > 0)
      && (!this.judged.checked || episode.steps.some((step) => step.truth || step.push))
      && (!words || (episode.words ??= haystack(episode)).includes(words)));
    this.list.replaceChildren(...this.shown.map((episode) => this.entry(episode)));
    this.list.hidden = !this.shown.length;
    this.say();
    const measured = (episode) => episode.steps.some((step) => step.truth);
    this.open(this.shown.includes(this.current) ? this.current : this.shown.find(measured) ?? this.shown[0]);
  }

  say() {
    const left = this.runs.reduce((sum, run) => sum + run.episodes.recorded - run.episodes.embedded, 0);
    const files = this.runs.reduce((sum, run) => sum + run.episodes.files, 0);
    const read = this.runs.reduce((sum, run) => sum + run.episodes.iterations.length, 0);
    let text = `${this.shown.length} of ${this.all.length} episodes. `;
    text += read < files ? `Embedded are the first, middle and last recorded iteration of ${this.runs.length > 1 ? "each run" : `the ${files}`}` : "Embedded is every recorded iteration";
    if (read < files && this.shades.length > 2) text += ", and those that were measured";
    text += left > 0 ? `; ${left} more episodes of them were left out to keep this file small.` : ".";
    this.count.replaceChildren(text, el("span", { class: "keys" }, ...[" ", el("kbd", {}, "j"), " and ", el("kbd", {}, "k"), " move through them",
      this.shades.length > 1 ? [", ", el("kbd", {}, "c"), " changes the colours."] : "."].flat()));
  }

  entry(episode) {
    const sub = [`it. ${episode.iteration}`, `${episode.steps.length} steps`];
    if (episode.flawed) sub.push(`${episode.flawed} flawed`);
    if (this.runs.length > 1) sub.unshift(this.runs[episode.run].label);
    return el("li", {}, el("button", { type: "button", "data-key": episode.key, onclick: () => this.open(episode) },
      el("span", { class: episode.success ? "mark-yes" : "mark-no", title: episode.ended }, episode.success ? "\u2713" : "\u2717"),
      el("span", { class: "what" }, episode.task),
      el("span", {}, short(episode.outcome ?? 0)),
      el("span", { class: "sub" }, sub.join(" · "))));
  }

  open(episode) {
    this.current = episode;
    for (const button of this.list.querySelectorAll("button")) {
      const here = Number(button.dataset.key) === episode?.key;
      button.setAttribute("aria-current", String(here));
      if (here) this.reveal(button);
    }
    if (!episode) {
      this.detail.replaceChildren(el("p", { class: "empty" }, "No episode matches these filters."));
      return;
    }
    const head = [episode.ref, `iteration ${episode.iteration}`, `outcome ${short(episode.outcome ?? 0)}`,
      `score ${short(episode.score ?? 0)}`, { success: "solved", failure: "failed", limit: "step limit reached" }[episode.ended] ?? episode.ended];
    if (this.runs.length > 1) head.unshift(this.runs[episode.run].label);
    const steps = episode.steps.map((step) => this.step(step));
    this.detail.replaceChildren(
      el("div", { class: "detail-head" }, ...head.map((text) => el("span", {}, text))),
      el("p", { class: "goal" }, episode.goal),
      ...(episode.told ? [el("p", { class: "hint" }, `told: ${episode.told.join(" ")}`)] : []),
      this.group(episode), this.strip(episode, steps), ...steps);
  }

  reveal(button) {
    const list = this.list.getBoundingClientRect();
    const box = button.getBoundingClientRect();
    if (box.top < list.top) this.list.scrollTop -= list.top - box.top;
    if (box.bottom > list.bottom) this.list.scrollTop += box.bottom - list.bottom;
  }

  group(episode) {
    const mates = this.all.filter((e) => e.run === episode.run && e.iteration === episode.iteration && e.group === episode.group);
    if (mates.length < 2) return null;
    return el("div", { class: "group" }, "Its group, by outcome:", ...mates.map((mate) =>
      el("button", { type: "button", "aria-current": String(mate === episode), title: mate.id, onclick: () => this.open(mate) }, short(mate.outcome ?? 0))));
  }

  strip(episode, steps) {
    return el("div", { class: "strip" }, "Steps:", ...episode.steps.map((step, i) => {
      const { look, mark, says } = this.tone(step);
      return el("button", {
        type: "button", class: `chip ${look}`, title: `step ${step.index}${says ? `, ${says}` : ""}`,
        onclick: () => steps[i].scrollIntoView({ block: "start" }),
      }, `${mark}${step.index}`);
    }));
  }

  step(step) {
    const chips = (step.labels ?? []).map((label) => {
      const verdict = label.verdict === "good" ? "good" : "flawed";
      return el("span", { class: `chip ${verdict}` }, `${MARK[verdict]} ${label.verdict}: ${label.kind}`, el("small", {}, `${label.source} ${percent(label.confidence)}`));
    });
    const command = known(step.command)
      ? el("div", { class: step.invalid ? "command refused" : "command" }, step.command)
      : el("div", { class: "command refused" }, step.raw ?? "(empty)");
    return el("section", { class: `step ${this.tone(step).look}`, "aria-label": `Step ${step.index}` },
      el("div", { class: "step-head" }, el("span", { class: "no" }, `Step ${step.index}`), ...chips, this.numbers(step)),
      known(step.observation) ? this.long(step.observation) : null,
      step.thought ? el("p", { class: "text thought" }, step.thought) : null,
      command,
      step.invalid ? el("div", { class: "reason" }, `\u26a0 not valid: ${step.invalid}`) : null,
      known(step.feedback) && step.feedback !== "" ? this.long(step.feedback) : null);
  }

  numbers(step) {
    const parts = [];
    if (step.reward) parts.push(el("span", {}, `outcome ${step.reward > 0 ? "+" : ""}${short(step.reward)}`));
    if (known(step.advantage)) {
      parts.push(this.bar(step.advantage), el("span", { title: "advantage" }, `A ${step.advantage > 0 ? "+" : ""}${short(step.advantage)}`));
    }
    if (step.truth) {
      const { advantage, low, high, label, value, action_value: reached, n } = step.truth;
      const title = `${label}, Q ${known(reached) ? short(reached) : "?"}, V ${known(value) ? short(value) : "?"}, ${n} pairs of branches`;
      parts.push(el("span", { class: `truth v-${label}`, title }, `A* ${sign(advantage)} [${short(low)}, ${short(high)}]`));
    }
    if (step.push) {
      parts.push(el("span", { title: "change of log \u03c0 after one step, in nats: by its own and by other samples" }, `\u0394 self ${sign(step.push.own)}, coupled ${sign(step.push.coupled)}`));
    }
    if (known(step.logprob)) parts.push(el("span", { title: `mean log-probability of ${step.tokens} tokens` }, `log p ${short(step.logprob)}`));
    return el("span", { class: "numbers" }, ...parts);
  }

  bar(advantage) {
    const box = svg("svg", { class: "adv", viewBox: "0 0 64 10", "aria-hidden": "true" });
    box.append(svg("rect", { x: 0, y: 1, width: 64, height: 8, rx: 2, class: "back" }));
    const width = Math.max(1, (31 * Math.abs(advantage)) / this.biggest);
    box.append(svg("rect", { x: advantage < 0 ? 32 - width : 32, y: 1, width, height: 8, class: advantage < 0 ? "down" : "up" }));
    box.append(svg("line", { x1: 32, x2: 32, y1: 0, y2: 10 }));
    return box;
  }

  long(text) {
    if (text.length <= FOLD) return el("p", { class: "text says" }, text);
    const first = text.slice(0, 140).replace(/\s+/g, " ");
    return el("details", {}, el("summary", {}, `${first}\u2026 (${text.length} characters)`), el("p", { class: "text says" }, text));
  }

  key(event) {
    const typing = event.target instanceof Element && event.target.closest("input[type=search], select, textarea");
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "c" && this.shades.length > 1) {
      const next = this.shades[(this.shades.indexOf(this.shade) + 1) % this.shades.length];
      this.paint(next);
    }
    if (event.key !== "j" && event.key !== "k") return;
    const next = this.shown[this.shown.indexOf(this.current) + (event.key === "j" ? 1 : -1)];
    if (!next) return;
    this.open(next);
    if (this.root.getBoundingClientRect().top > window.innerHeight / 2) this.root.scrollIntoView();
  }
}

function showEpisodes(data) {
  const root = document.getElementById("browser");
  if (data.episodes.length) new Browser(root, data);
  else root.append(el("p", { class: "empty" }, "No episodes were recorded, or none could be read."));
}
