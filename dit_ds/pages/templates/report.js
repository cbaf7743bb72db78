// Draws the curves of a report. The data is JSON in the page: names and numbers, never code.
"use strict";
(() => {
  const runs = JSON.parse(document.getElementById("curve-data").textContent);
  const plots = [
    { title: "Training loss", kind: "train", metrics: { loss: "loss" } },
    { title: "IoU in evaluation", kind: "eval", metrics: { miou: "mIoU", oiou: "oIoU", giou: "gIoU", ciou: "cIoU" }, percent: true },
    { title: "Precision in evaluation", kind: "eval", percent: true,
      metrics: { "p@0.5": "P@0.5", "p@0.6": "P@0.6", "p@0.7": "P@0.7", "p@0.8": "P@0.8", "p@0.9": "P@0.9" } },
    { title: "Learning rate", kind: "train", metrics: { lr: "rate" } },
    { title: "Gradient norm", kind: "train", metrics: { grad_norm: "norm" } },
    { title: "Throughput, samples a second", kind: "train", metrics: { samples_per_second: "samples/s" } },
    { title: "Memory of the fullest rank, GiB", kind: "train",
      metrics: { peak_memory_gib: "peak", reserved_memory_gib: "reserved" } },
    { title: "Share of the time", kind: "train", percent: true,
      metrics: { data_wait: "waiting for data", mfu: "MFU" } },
  ];
  const grey = "#80848c"; // readable on a light and on a dark page
  const colors = ["#3b82c4", "#e07b39", "#3a9d6a", "#c2527e", "#8566c9", "#a68a2d", "#4aa5b0", "#7b7f87"];
  const config = {
    background: null, font: "system-ui, 'DejaVu Sans', sans-serif",
    view: { stroke: null },
    axis: { labelColor: grey, titleColor: grey, gridColor: grey, gridOpacity: 0.2, domainColor: grey, tickColor: grey, labelLimit: 80 },
    legend: { labelColor: grey, titleColor: grey, orient: "bottom", labelLimit: 260, symbolType: "stroke", symbolStrokeWidth: 3 },
    range: { category: colors },
  };

  function rowsOf(plot) {
    const rows = [];
    for (const { name, [plot.kind]: columns } of runs) {
      for (const [metric, label] of Object.entries(plot.metrics)) {
        (columns[metric] || []).forEach((value, i) => {
          if (value !== null) rows.push({ run: name, metric: label, step: columns.step[i], value: plot.percent ? 100 * value : value });
        });
      }
    }
    return rows;
  }

  function specification(plot, rows) {
    const metrics = [...new Set(rows.map((row) => row.metric))];
    const names = runs.map((run) => run.name);
    const several = names.length > 1;
    const few = rows.length <= 60 * names.length * metrics.length;
    const color = several ? { field: "run", type: "nominal", title: null, scale: { domain: names } }
      : { field: "metric", type: "nominal", title: null, scale: { domain: metrics }, ...(metrics.length === 1 && { legend: null }) };
    const dash = several && metrics.length > 1
      ? { strokeDash: { field: "metric", type: "nominal", title: null, scale: { domain: metrics } } } : {};
    const chosen = several ? "run" : "metric";
    return {
      data: { values: rows }, width: "container", height: 210, autosize: { type: "fit-x", contains: "padding" }, config,
      params: [
        { name: "alone", select: { type: "point", fields: [chosen] }, bind: "legend" },
        { name: "zoom", select: { type: "interval", encodings: ["x", "y"], zoom: "wheel![event.shiftKey]" }, bind: "scales" },
      ],
      mark: { type: "line", strokeWidth: 1.8, point: few ? { size: 28 } : { size: 60, opacity: 0 }, clip: true },
      encoding: {
        x: { field: "step", type: "quantitative", title: "step", axis: { grid: false }, scale: { domainMin: 0 } },
        y: { field: "value", type: "quantitative", title: plot.percent ? "%" : null, scale: { zero: false } },
        color, ...dash,
        opacity: { condition: { param: "alone", value: 1 }, value: 0.12 },
        tooltip: [
          ...(several ? [{ field: "run", title: "run" }] : []), { field: "metric", title: "metric" },
          { field: "step", title: "step", format: ",d" }, { field: "value", title: "value", format: ".5~g" },
        ],
      },
    };
  }

  const section = document.getElementById("plots");
  const drawn = plots.map((plot) => {
    const rows = rowsOf(plot);
    if (!rows.length) return null;
    const box = document.createElement("div");
    const title = document.createElement("h3");
    const place = document.createElement("div");
    box.className = "plot";
    title.textContent = plot.title;
    box.append(title, place);
    section.append(box);
    return window.vegaEmbed(place, specification(plot, rows), {
      mode: "vega-lite", ast: true, renderer: "svg", actions: { export: true, source: false, compiled: false, editor: false },
    });
  });
  Promise.all(drawn).then((views) => {
    if (!views.some(Boolean)) section.textContent = "metrics.jsonl has no line yet.";
    document.body.dataset.drawn = "yes";
  });
})();
