"use strict";
// Draws the plots and the pictures of a comparison's page from the values in #data.

const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const narrow = () => window.innerWidth < 760;
const isDark = () => root.classList.contains("dark");
const colorOf = style => isDark() ? style.on_black : style.color;
const color = name => getComputedStyle(root).getPropertyValue(name).trim();
const unique = values => [...new Set(values)];
const element = (name, attributes = {}, ...children) => {
  const made = Object.assign(document.createElement(name), attributes);
  made.append(...children);
  return made;
};

// plotly reads tags and entities in its texts; a template is never made of a name.
const safe = text => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");

// A select with a label; calls `redraw` when another value is chosen. One value needs no select.
const choice = (section, label, values, redraw) => {
  const select = element("select", {onchange: () => redraw()});
  select.append(...values.map(value => element("option", {value, textContent: value})));
  if (values.length > 1)
    section.querySelector(".choices").append(element("label", {}, label, select));
  return () => select.value;
};

const draw = (section, traces, layout) => {
  const axis = {gridcolor: color("--line"), zerolinecolor: color("--soft"), automargin: true};
  const plot = section.querySelector(".plot");
  Plotly.react(plot, traces, {
    paper_bgcolor: "#0000", plot_bgcolor: "#0000", hovermode: "closest",
    font: {family: "system-ui, sans-serif", size: narrow() ? 11 : 13, color: color("--ink")},
    margin: {l: 55, r: 15, t: 10, b: 45}, ...layout,
    hoverlabel: {align: "left", bgcolor: color("--raised"), bordercolor: color("--line"),
                 font: {color: color("--ink")}},
    legend: narrow() ? {orientation: "h", y: 1.02, yanchor: "bottom"} : {},
    xaxis: {...axis, ...layout.xaxis}, yaxis: {...axis, ...layout.yaxis},
  }, {responsive: true, displayModeBar: false});
  plot.removeAllListeners("plotly_click");
  plot.on("plotly_click", ({points: [point]}) => point.customdata &&
    showPoint(...point.customdata));
};

// --- the changes of the loss ---------------------------------------------------------------------

const MODEL_SYMBOLS = ["circle", "square", "diamond", "triangle-up", "triangle-down", "cross",
                       "star", "x"];

const drawChanges = (section, objective) => {
  const rows = data.changes.filter(
    row => row.objective === objective && row.method !== data.anchor);
  const models = unique(rows.map(row => row.model));
  const meanOf = method => {
    const own = rows.filter(row => row.method === method);
    return own.reduce((sum, row) => sum + row.mean, 0) / own.length;
  };
  const methods = unique(rows.map(row => row.method)).sort((a, b) => meanOf(b) - meanOf(a));
  const height = (row, index) =>
    methods.indexOf(row.method) + (models.length > 1 ? 0.3 - 0.6 * index / (models.length - 1) : 0);
  const traces = [];
  if (models.length === 1) {
    // Each image is a small dot, all in one row, below the mean.
    traces.push(...rows.map(row => ({
      type: "scatter", mode: "markers", showlegend: false,
      x: Object.values(row.images), y: Object.keys(row.images).map(() => height(row, 0) - 0.22),
      marker: {size: 5, opacity: 0.55, color: colorOf(data.styles[row.method])},
      text: Object.keys(row.images).map(image => `${safe(row.method)}<br>${safe(image)}`),
      customdata: Object.keys(row.images).map(image => [row.method, row.model, image]),
      hovertemplate: "%{text}: %{x:+.2f} %<extra></extra>",
    })));
  }
  models.forEach((model, index) => {
    // The legend takes the colour of the first point, so that is a grey one without a place.
    const own = [{method: null, mean: null}, ...rows.filter(row => row.model === model)];
    traces.push({
      type: "scatter", mode: "markers", name: safe(model), showlegend: models.length > 1,
      x: own.map(row => row.mean), y: own.map(row => height(row, index)),
      error_x: {type: "data", array: own.map(row => row.half ?? null), thickness: 1.2, width: 3,
                color: color("--soft")},
      marker: {size: 9, symbol: MODEL_SYMBOLS[index % MODEL_SYMBOLS.length],
               color: own.map(row => row.method === null ? color("--soft") :
                 colorOf(data.styles[row.method]))},
      customdata: own.map(row => [row.method, row.model]),
      text: own.map(row => row.method === null ? "" :
        `${safe(row.method)}, ${safe(row.model)}<br>${row.mean.toFixed(2)}` +
        `${row.half === null ? "" : ` ± ${row.half.toFixed(2)}`} %`),
      hovertemplate: "%{text}<extra></extra>",
    });
  });
  // All rows should be on the first screen, if they can be read there.
  const [least, most] = models.length > 1 ? [6, 9].map(each => 15 + each * models.length) : [20, 40];
  const room = Math.min(most, Math.max(least, 520 / methods.length));
  const tall = Math.max(150, 75 + room * methods.length) + (narrow() ? 20 * models.length : 0);
  draw(section, traces, {
    height: tall,
    xaxis: {title: {text: `change of the loss against ${safe(data.anchor)}, %`}, zeroline: true,
            zerolinewidth: 2, side: tall > 560 ? "top" : "bottom"},
    yaxis: {tickvals: methods.map((_, index) => index), ticktext: methods.map(safe), showgrid: false,
            range: [-0.6, methods.length - 0.4], zeroline: false},
  });
};

// --- rate and distortion -------------------------------------------------------------------------

const QUALITIES = {psnr: "PSNR (dB)", ms_ssim_db: "MS-SSIM (dB)",
                   psnr_inside: "PSNR inside the maps (dB)"};
const isKnown = value => value !== null && value !== undefined;

// Other codecs and published curves are grey, and differ by these.
const OTHER_SYMBOLS = ["line-ns-open", "x-thin-open", "y-up-open", "asterisk-open", "circle-open",
                       "square-open"];
const OTHER_DASHES = ["dot", "dash", "dashdot", "longdash"];

const drawCurves = (section, title) => {
  const key = Object.keys(QUALITIES).find(one => QUALITIES[one] === title);
  const traces = [], own = {bpp: [], quality: []};
  const others = data.curves.filter(curve => curve.other).map(curve => curve.curve);
  for (const curve of data.curves) {
    const number = others.indexOf(curve.curve);
    const at = curve.bpp.map((_, index) => index).filter(index => isKnown(curve[key]?.[index]));
    if (!at.length) continue;
    const style = data.styles[curve.curve];
    const paint = style ? colorOf(style) : color("--soft");
    const bpp = at.map(index => curve.bpp[index]), quality = at.map(index => curve[key][index]);
    if (!curve.other) { own.bpp.push(...bpp); own.quality.push(...quality); }
    traces.push({
      type: "scatter", mode: at.length > 1 ? "lines+markers" : "markers", name: safe(curve.curve),
      x: bpp, y: quality,
      line: {color: paint, width: style ? 2 : 1.2,
             dash: style?.dash ?? OTHER_DASHES[number % OTHER_DASHES.length]},
      marker: {color: paint, symbol: style?.symbol ?? OTHER_SYMBOLS[number % OTHER_SYMBOLS.length],
               ...(style ? {} : {line: {width: 1.4}}), size: style ? 8 : 7},
      customdata: curve.other ? [] : at.map(index => [curve.method[index], curve.model[index]]),
      text: at.map(index => safe([curve.curve, curve.other ? "" : curve.model[index]]
        .filter(Boolean).join(", "))),
      hovertemplate: "%{text}<br>%{x:.4f} bpp, %{y:.2f} dB<extra></extra>",
    });
  }
  draw(section, traces, {
    height: narrow() ? 420 : 480,
    xaxis: {title: {text: "bits per pixel"}, range: around(own.bpp, 0.01)},
    yaxis: {title: {text: title}, range: around(own.quality, 0.1)},
  });
};

// The range of values and a quarter of it more on both sides, at least `least`.
const around = (values, least) => {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const room = Math.max((high - low) / 4, least);
  return [low - room, high + room];
};

// --- trajectories --------------------------------------------------------------------------------

// 1, 2 and 5 times the powers of ten between the lowest and the highest value above 0.
const ticksOfLog = values => {
  const above = values.filter(value => value > 0);
  const [low, high] = [Math.min(...above), Math.max(...above)];
  const tickvals = [];
  for (let power = 10 ** Math.floor(Math.log10(low)); power <= high; power *= 10)
    tickvals.push(...[1, 2, 5].map(digit => digit * power));
  return {tickvals, ticktext: tickvals.map(value => Number(value.toPrecision(1)).toString())};
};

const drawWay = (section, {quantity, over, model, objective}) => {
  const traces = [];
  const shown = data.trajectories.filter(run => run.model === model && run.values[quantity] &&
    (run.objective === objective || !quantity.includes("loss")));
  for (const run of shown) {
    const style = data.styles[run.method], paint = colorOf(style);
    run.values[quantity].forEach((values, index) => traces.push({
      type: "scatter", mode: index ? "lines" : "lines+markers", legendgroup: run.method,
      showlegend: index === 0, marker: {symbol: style.symbol, size: 7, color: paint,
                                        maxdisplayed: 9},
      name: safe(run.method), x: run[over], y: values, opacity: index ? 0.55 : 1,
      line: {color: paint, dash: style.dash, width: index ? 1 : 2},
      customdata: values.map(() => [run.method, model]),
      text: values.map(() => safe(run.method) + (index ? ", relaxed" : "")),
      hovertemplate: `%{text}<br>${over} %{x:.4g}: %{y:.5g}<extra></extra>`,
    }));
  }
  const layout = {
    height: narrow() ? 420 : 480,
    xaxis: {title: {text: over === "step" ? "step, or pass of the polish" : "seconds per image"},
            type: "log", ...ticksOfLog(shown.flatMap(run => run[over]))},
    yaxis: {title: {text: quantity}},
  };
  const trueOnes = shown.map(run => run.values[quantity][0].filter(isKnown));
  if (quantity === "loss" && trueOnes.length) {
    // Annealing may begin far above the base, but only what is below it matters.
    const base = Math.max(...trueOnes.map(one => one[0])), low = Math.min(...trueOnes.flat());
    layout.yaxis.range = [low - 0.1 * (base - low), base + 0.15 * (base - low)];
  }
  draw(section, traces, layout);
};

// --- pictures ------------------------------------------------------------------------------------

const card = (version, original, kind) => {
  const source = version[kind] || version.picture;
  const image = element("img", {src: source, alt: `${version.label} ${version.model}`,
                                draggable: false});
  if (kind === "picture" && version !== original) {
    image.onpointerdown = () => { image.src = original.picture; };
    for (const end of ["pointerup", "pointerleave", "pointercancel"])
      image.addEventListener(end, () => { image.src = source; });
  }
  return element("figure", {className: "card"}, image, element("figcaption", {},
    element("strong", {textContent: version.label}),
    version.words ? `\n${version.words}` : ""));
};

const drawPictures = (section, {shown: {versions, model}, kind}) => {
  const chosen = versions.filter(one => (one.model === model || !one.model) &&
    (kind === "picture" || one.bits));
  section.querySelector(".cards").replaceChildren(
    ...chosen.map(version => card(version, versions[0], kind)));
};

// The pictures of a point of a plot: the original, the base and the method.
const showPoint = (method, model, image) => {
  const dialog = document.getElementById("point");
  const chosen = data.pictures.filter(one => image === undefined || one.image === image);
  const cards = chosen.flatMap(({versions}) => {
    // A base that was refined for several lambdas is one point, and its pictures are all the same.
    const own = versions.find(one => one.label === method &&
      (one.model === model || method === "base" && one.model.startsWith(`${model} at `)));
    const base = versions.find(one => one.label === "base" && one.model === own?.model);
    return own ?
      [...new Set([versions[0], base, own])].map(version => card(version, versions[0], "picture")) : [];
  });
  dialog.querySelector("h2").textContent = [method, model, image].filter(Boolean).join(", ");
  dialog.querySelector("p").textContent = cards.length ?
    "Press on a picture to see the original in its place." :
    "The page has pictures of the first images alone; of the very first with every model.";
  dialog.querySelector(".cards").replaceChildren(...cards);
  dialog.showModal();
};

// --- tables --------------------------------------------------------------------------------------

const valueOf = cell => {
  const number = parseFloat(cell.textContent);
  return isNaN(number) ? cell.textContent : number;
};
// Numbers come before texts, in both directions.
const compare = (x, y, sign) =>
  typeof x === typeof y ? sign * ((x > y) - (x < y)) : typeof x === "number" ? -1 : 1;
const sortBy = button => {
  const head = button.parentNode, heads = [...head.parentNode.children];
  const column = heads.indexOf(head), up = head.getAttribute("aria-sort") !== "ascending";
  for (const other of heads) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  for (const body of head.closest("table").tBodies) {
    const rows = [...body.rows].filter(row => !row.classList.contains("group"));
    rows.sort((a, b) => compare(valueOf(a.cells[column]), valueOf(b.cells[column]), up ? 1 : -1));
    body.append(...rows);
  }
};
for (const button of document.querySelectorAll("th button"))
  button.addEventListener("click", () => sortBy(button));

// --- the page ------------------------------------------------------------------------------------

const redraws = [];
const show = (id, isFilled, build) => {
  const section = document.getElementById(id);
  if (!isFilled) return section.remove();
  section.hidden = false;
  redraws.push(build(section));
};

show("changes", data.changes.some(row => row.method !== data.anchor), section => {
  const objective = choice(section, "loss", unique(data.changes.map(row => row.objective)),
                           () => redraw());
  const redraw = () => drawChanges(section, objective());
  return redraw;
});
show("curves", data.curves.some(curve => !curve.other), section => {
  const known = Object.keys(QUALITIES).filter(
    key => data.curves.some(curve => !curve.other && curve[key]?.some(isKnown)));
  const title = choice(section, "quality", known.map(key => QUALITIES[key]), () => redraw());
  const redraw = () => drawCurves(section, title());
  return redraw;
});
show("way", data.trajectories.length, section => {
  const all = data.trajectories;
  const quantity = choice(section, "show", unique(all.flatMap(run => Object.keys(run.values))),
                          () => redraw());
  const over = choice(section, "over", ["step", "seconds"], () => redraw());
  const model = choice(section, "model", unique(all.map(run => run.model)), () => redraw());
  const objective = choice(section, "loss", unique(all.map(run => run.objective)), () => redraw());
  const redraw = () => drawWay(section, {quantity: quantity(), over: over(), model: model(),
                                         objective: objective()});
  return redraw;
});
show("pictures", data.pictures.length, section => {
  const found = Object.fromEntries(data.pictures.flatMap(({image, versions}) =>
    unique(versions.map(version => version.model)).filter(Boolean).map(
      model => [`${image}, ${model}`, {versions, model}])));
  const name = choice(section, "image", Object.keys(found), () => redraw());
  const kind = choice(section, "show", ["picture", "bits"], () => redraw());
  const redraw = () => drawPictures(section, {shown: found[name()], kind: kind()});
  return redraw;
});

const setScheme = dark => {
  root.classList.toggle("dark", dark);
  for (const redraw of redraws) redraw();
};
const prefersDark = window.matchMedia("(prefers-color-scheme: dark)");
document.getElementById("scheme").onclick = () => setScheme(!isDark());
prefersDark.addEventListener("change", event => setScheme(event.matches));
setScheme(prefersDark.matches);
let width = window.innerWidth;
window.addEventListener("resize", () => {
  if (window.innerWidth !== width) { width = window.innerWidth; redraws.forEach(one => one()); }
});
