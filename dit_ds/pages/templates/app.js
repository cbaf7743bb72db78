// The page of `dit-ds app`: sends a picture once, then what is meant in it; shows the mask and the layers' attention.
"use strict";
(() => {
  const settings = JSON.parse(document.getElementById("settings").textContent);
  const at = (id) => document.getElementById(id);
  const stage = at("stage"), marks = at("marks"), text = at("text");
  const svg = (name, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
    return made;
  };
  let picture = null; // {id, width, height}
  let points = [], box = null, dragged = null;
  let busy = false, again = false, timer = 0;

  function fail(line) {
    at("error").textContent = line;
    at("error").hidden = !line;
  }

  async function post(path, type, body) {
    let response;
    try {
      response = await fetch(path, { method: "POST", headers: { "Content-Type": type }, body });
    } catch {
      throw new Error("no answer: does dit-ds app still run?");
    }
    const answer = await response.json().catch(() => ({ error: "the app failed: its terminal says why" }));
    if (!response.ok) throw new Error(answer.error);
    return answer;
  }

  // --- the picture

  async function send(file) {
    fail("");
    if (file.size > settings.most_bytes) {
      fail(`${file.name} has more than ${settings.most_bytes / 2 ** 20} MiB: make it smaller`);
      return;
    }
    try {
      use(await post("/pictures", "application/octet-stream", file));
    } catch (error) {
      fail(error.message);
    }
  }

  function use(chosen) {
    picture = chosen;
    points = [];
    box = null;
    stage.classList.remove("empty");
    stage.style.maxWidth = `calc(75vh * ${picture.width / picture.height})`; // a tall picture fits the window, too
    at("hint").hidden = true;
    at("other").hidden = false;
    at("picture").src = `/pictures/${picture.id}`;
    at("picture").hidden = false;
    marks.setAttribute("viewBox", `0 0 ${picture.width} ${picture.height}`);
    marks.toggleAttribute("hidden", !settings.places);
    clearAnswer();
    draw();
    ask();
  }

  at("open").addEventListener("click", () => at("file").click());
  at("other").addEventListener("click", () => at("file").click());
  at("file").addEventListener("change", (event) => {
    if (event.target.files.length) send(event.target.files[0]);
    event.target.value = "";
  });
  addEventListener("dragover", (event) => {
    event.preventDefault();
    stage.classList.add("over");
  });
  addEventListener("dragleave", () => stage.classList.remove("over"));
  addEventListener("drop", (event) => {
    event.preventDefault();
    stage.classList.remove("over");
    const file = event.dataTransfer.files[0];
    if (file) send(file);
    else fail("that was no file: drop a picture's file, or choose one");
  });
  document.querySelectorAll("[data-sample]").forEach((button) =>
    button.addEventListener("click", () => {
      const sample = settings.samples[Number(button.dataset.sample)];
      if (text) text.value = sample.text;
      use(sample);
      scrollTo({ top: 0, behavior: "smooth" });
    }));

  // --- what is meant

  if (text) text.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(ask, 300);
  });

  const place = (event) => {
    const edge = marks.getBoundingClientRect();
    const within = (value, most) => Math.min(Math.max(value, 0), most);
    return [within((event.clientX - edge.left) / edge.width * picture.width, picture.width - 0.01),
            within((event.clientY - edge.top) / edge.height * picture.height, picture.height - 0.01)];
  };
  const between = ([x0, y0], [x1, y1]) => [Math.min(x0, x1), Math.min(y0, y1), Math.max(x0, x1), Math.max(y0, y1)];
  const tool = () => document.querySelector("input[name=tool]:checked").value;

  marks.addEventListener("pointerdown", (event) => {
    if (tool() === "point") {
      points.push(place(event));
      draw();
      ask();
    } else {
      dragged = place(event);
      marks.setPointerCapture(event.pointerId);
    }
  });
  marks.addEventListener("pointermove", (event) => {
    if (dragged) {
      box = between(dragged, place(event));
      draw();
    }
  });
  marks.addEventListener("pointerup", () => {
    if (!dragged) return;
    dragged = null;
    if (box && (box[2] - box[0] < 1 || box[3] - box[1] < 1)) box = null;
    draw();
    ask();
  });
  at("clear")?.addEventListener("click", () => {
    points = [];
    box = null;
    draw();
    ask();
  });

  function draw() {
    const unit = Math.max(picture.width, picture.height) / 100;
    const shown = points.map(([cx, cy]) => svg("circle", { cx, cy, r: unit, "stroke-width": unit / 3 }));
    if (box) {
      const [x, y, right, bottom] = box;
      shown.push(svg("rect", { x, y, width: right - x, height: bottom - y, "stroke-width": unit / 2 }));
    }
    marks.replaceChildren(...shown);
  }

  // --- the answer

  function clearAnswer() {
    at("mask").hidden = true;
    at("result").hidden = true;
    if (at("attention")) at("attention").hidden = true;
  }

  // one question at a time; what changed meanwhile is asked next
  async function ask() {
    if (!picture) return;
    if (busy) {
      again = true;
      return;
    }
    const words = text ? text.value.trim() : "";
    fail("");
    if (!words && !points.length && !box) {
      clearAnswer();
      return;
    }
    busy = true;
    document.body.classList.add("waiting");
    const of = picture;
    const start = performance.now();
    try {
      const answer = await post("/segment", "application/json", JSON.stringify({ picture: of.id, text: words, points, box }));
      if (of === picture) show(answer, (performance.now() - start) / 1000);
    } catch (error) {
      if (of === picture) {
        clearAnswer();
        fail(error.message);
      }
    }
    busy = false;
    document.body.classList.remove("waiting");
    if (again) {
      again = false;
      ask();
    }
  }

  function show(answer, seconds) {
    at("mask").src = answer.mask;
    at("mask").hidden = !at("show").checked;
    at("covered").textContent = `${(100 * answer.covered).toFixed(1)} % of the picture`;
    at("score").textContent = answer.score.toFixed(2);
    at("seconds").textContent = `${seconds.toFixed(2)} s`;
    at("warnings").textContent = answer.warnings.join("; ");
    at("save").href = answer.file;
    at("result").hidden = false;
    if (!at("attention")) return;
    at("attention").hidden = !answer.layers.length;
    at("layers").replaceChildren(...answer.layers.map((layer) => {
      const figure = document.createElement("figure"), image = document.createElement("img");
      const caption = document.createElement("figcaption"), title = document.createElement("b");
      image.src = layer.picture;
      image.alt = layer.title;
      title.textContent = layer.title;
      caption.append(title, document.createElement("br"), layer.label);
      figure.append(image, caption);
      return figure;
    }));
  }

  at("show").addEventListener("change", () => { at("mask").hidden = !at("show").checked; });
})();
