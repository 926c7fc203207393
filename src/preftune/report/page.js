"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const names = Object.keys(figures);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const box = (name) => document.getElementById("chart-" + name);

  // Colours follow the page, so that one figure serves light and dark.
  function themed(layout) {
    const css = getComputedStyle(document.documentElement);
    const colour = (key) => css.getPropertyValue(key).trim();
    const out = {
      height: 340, margin: { l: 62, r: 12, t: 12, b: 46 }, showlegend: false,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("--ink"), size: 13, family: getComputedStyle(document.body).fontFamily },
      hoverlabel: {
        bgcolor: colour("--paper"), bordercolor: colour("--rule"),
        font: { color: colour("--ink") }, namelength: 40,
      },
      ...layout,
    };
    for (const key of Object.keys(layout).filter((key) => /^[xy]axis/.test(key))) {
      out[key] = {
        gridcolor: colour("--rule"), zerolinecolor: colour("--soft"), zerolinewidth: 1,
        linecolor: colour("--rule"), automargin: true, ...layout[key],
      };
    }
    return out;
  }

  function draw() {
    return Promise.all(names.map((name) => {
      const [data, layout] = figures[name];
      return Plotly.react(box(name), data, themed(layout), {
        responsive: true, displaylogo: false, displayModeBar: false,
      });
    }));
  }

  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(shown));
      for (const name of names) {
        for (const trace of figures[name][0]) {
          if (String(trace.meta) === button.dataset.run) trace.visible = shown;
        }
      }
      draw();
    });
  }
  // What a chart stands against: its traces have the numbers of each axis under `axes`.
  for (const button of document.querySelectorAll(".axes button")) {
    button.addEventListener("click", () => {
      for (const other of document.querySelectorAll(".axes button")) {
        other.setAttribute("aria-pressed", String(other === button));
      }
      for (const name of names) {
        for (const trace of figures[name][0]) {
          if (trace.axes) trace.x = trace.axes[button.dataset.axis];
        }
        if (figures[name][0].some((trace) => trace.axes)) {
          figures[name][1].xaxis = { title: { text: button.dataset.title } };
        }
      }
      draw();
    });
  }
  dark.addEventListener("change", draw);
  draw().then(() => { document.documentElement.dataset.charts = String(names.length); });
})();
