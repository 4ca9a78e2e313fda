// Start: theme, curves, episodes.

function showTheme() {
  const button = document.getElementById("theme");
  const modes = ["auto", "light", "dark"];
  let mode = "auto";
  const apply = () => {
    if (mode === "auto") document.documentElement.removeAttribute("data-theme");
    else document.documentElement.setAttribute("data-theme", mode);
    button.replaceChildren(el("span", { class: "wide" }, "Theme: "), mode);
    button.setAttribute("aria-label", `Colour theme: ${mode}`);
  };
  try {
    const kept = localStorage.getItem("untwine-theme");
    if (modes.includes(kept)) mode = kept;
  } catch { /* storage may be forbidden for local files */ }
  button.hidden = false;
  button.addEventListener("click", () => {
    mode = modes[(modes.indexOf(mode) + 1) % 3];
    apply();
    try {
      localStorage.setItem("untwine-theme", mode);
    } catch { /* the choice then lasts for this visit */ }
  });
  apply();
}

const data = JSON.parse(document.getElementById("data").textContent);
showTheme();
showCurves(data.runs);
showMicroscope(data.runs);
showEpisodes(data);
document.documentElement.setAttribute("data-ready", "yes");
