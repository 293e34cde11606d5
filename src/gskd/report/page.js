"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const LAYER_IMAGE = "image", LAYER_TRUTH = "truth", WRONG = "errors of ";
  const IGNORED = 255;
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

  function fill(select, names, chosen) {
    select.replaceChildren(...names.map(([value, text]) => new Option(text, value)));
    if (chosen !== undefined) select.value = chosen;
  }

  // What a picture holds, as numbers: read back from the PNG inside the page, once.
  const decoded = new Map();
  function decode(uri) {
    if (!decoded.has(uri)) {
      decoded.set(uri, new Promise((resolve, reject) => {
        const image = new Image();
        image.onload = () => {
          const canvas = document.createElement("canvas");
          [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
          const context = canvas.getContext("2d", { willReadFrequently: true });
          context.drawImage(image, 0, 0);
          resolve(context.getImageData(0, 0, canvas.width, canvas.height));
        };
        image.onerror = () => reject(new Error("a picture of this page cannot be read"));
        image.src = uri;
      }));
    }
    return decoded.get(uri);
  }

  function canvasOf(pixels) {
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [pixels.width, pixels.height];
    canvas.getContext("2d").putImageData(pixels, 0, 0);
    return canvas;
  }

  // Pictures: two layers, divided by a line, and what every network says at the cross.
  const view = at("view");
  const cross = { x: 0.5, y: 0.5 };
  let shown = null;

  async function load(number) {
    const picture = data.pictures[number];
    const labels = {};
    for (const [name, uri] of Object.entries(picture.labels)) labels[name] = await decode(uri);
    return { picture, image: await decode(picture.image), labels };
  }

  function layer(name) {
    const { image, labels } = shown;
    const out = new ImageData(new Uint8ClampedArray(image.data), image.width, image.height);
    if (name === LAYER_IMAGE) return canvasOf(out);
    const wrong = name.startsWith(WRONG);
    const label = labels[wrong ? name.slice(WRONG.length) : name].data;
    const truth = labels[LAYER_TRUTH].data;
    const strength = at("strength").value / 100;
    for (let i = 0; i < out.data.length; i += 4) {
      let colour = null;
      if (wrong) {
        const grey = (out.data[i] + out.data[i + 1] + out.data[i + 2]) / 3;
        out.data[i] = out.data[i + 1] = out.data[i + 2] = grey;
        if (truth[i] !== IGNORED && label[i] !== truth[i]) colour = [213, 94, 0];
      } else {
        colour = label[i] < data.palette.length ? data.palette[label[i]] : [0, 0, 0];
      }
      if (colour) for (let c = 0; c < 3; c++) out.data[i + c] += strength * (colour[c] - out.data[i + c]);
    }
    return canvasOf(out);
  }

  function draw() {
    if (!shown) return;
    const zoom = Math.max(1, Math.round(720 / shown.image.width));  // lines are as thin on a small image
    const width = zoom * shown.image.width, height = zoom * shown.image.height;
    [view.width, view.height] = [width, height];
    const context = view.getContext("2d");
    context.imageSmoothingEnabled = false;
    const middle = Math.round(width * at("divide").value / 100);
    context.drawImage(layer(at("left").value), 0, 0, width, height);
    if (middle < width) {
      const from = middle / zoom;
      context.drawImage(layer(at("right").value), from, 0, shown.image.width - from, shown.image.height, middle, 0, width - middle, height);
    }
    context.fillStyle = "#fff";
    context.fillRect(middle - 1, 0, 2, height);
    const [x, y] = [cross.x * width, cross.y * height];
    for (const [colour, thick] of [["#000", 4], ["#fff", 2]]) {
      context.strokeStyle = colour;
      context.lineWidth = thick;
      context.beginPath();
      context.moveTo(x - 8, y); context.lineTo(x + 8, y);
      context.moveTo(x, y - 8); context.lineTo(x, y + 8);
      context.stroke();
    }
    read();
  }

  function read() {
    const { width, height } = shown.image;
    const column = clamp(Math.floor(cross.x * width), 0, width - 1);
    const row = clamp(Math.floor(cross.y * height), 0, height - 1);
    const words = Object.entries(shown.labels).map(([name, label]) => {
      const value = label.data[4 * (row * width + column)];
      return `${name}: ${value < data.classes.length ? data.classes[value] : "ignored"}`;
    });
    at("reading").textContent = `At the cross: ${words.join(" · ")}`;
  }

  async function showPicture() {
    shown = await load(Number(at("picture").value));
    draw();
  }

  function setUpPictures() {
    fill(at("picture"), data.pictures.map((picture, number) => [number, picture.name]));
    const layers = [LAYER_IMAGE, LAYER_TRUTH, ...data.networks, ...data.networks.map((name) => WRONG + name)];
    const last = data.networks[data.networks.length - 1];
    for (const id of ["left", "right"]) fill(at(id), layers.map((name) => [name, name]), id === "left" ? LAYER_TRUTH : last);
    at("picture").addEventListener("change", showPicture);
    for (const id of ["left", "right", "divide", "strength"]) {
      for (const event of ["input", "change"]) at(id).addEventListener(event, draw);
    }
    view.addEventListener("click", (event) => {
      const box = view.getBoundingClientRect();
      cross.x = (event.clientX - box.left) / box.width;
      cross.y = (event.clientY - box.top) / box.height;
      draw();
    });
    view.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
      if (!(event.key in moves) || !shown) return;
      event.preventDefault();
      const [dx, dy] = moves[event.key], step = event.shiftKey ? 32 : 8;  // of the canvas
      cross.x = clamp(cross.x + dx * step / view.width, 0, 1);
      cross.y = clamp(cross.y + dy * step / view.height, 0, 1);
      draw();
    });
    return showPicture();
  }

  // Structure: the maps of all points, and one point's similarity with the whole image.
  const cosine = (value) => value / 127 - 1;
  let scene = null, low = 0;

  function colourOf(value) {
    return data.colours[clamp(Math.round(255 * (cosine(value) - low) / (1 - low || 1)), 0, 255)];
  }

  function panelsOf() {
    const wanted = [data.teacher, data.before, at("student").value];
    return wanted.filter((name) => name in scene.similarity);
  }

  async function showScene() {
    const found = data.structures[Number(at("scene").value)];
    scene = { ...found, similarity: {}, everywhere: {}, photo: await decode(data.pictures[found.picture].image) };
    for (const [name, uri] of Object.entries(found.similarity)) scene.similarity[name] = await decode(uri);
    for (const [name, uri] of Object.entries(found.everywhere)) scene.everywhere[name] = await decode(uri);
    const counts = {};
    fill(at("point"), found.label.map((label, number) => {
      counts[label] = (counts[label] || 0) + 1;
      return [number, `${data.classes[label]} ${counts[label]}`];
    }));
    const students = Object.keys(found.similarity).filter((name) => name !== data.teacher && name !== data.before);
    const kept = at("student").value;
    fill(at("student"), students.map((name) => [name, name]), students.includes(kept) ? kept : students[students.length - 1]);
    showPoint();
  }

  function panel(name) {
    const box = document.createElement("div");
    box.className = "panel";
    box.dataset.network = name;
    const title = document.createElement("h3");
    title.textContent = name;
    const picture = document.createElement("canvas");
    picture.className = "where";
    const map = document.createElement("canvas");
    map.className = "map";
    for (const [canvas, text] of [[picture, "what the chosen point resembles"], [map, "similarity of all points"]]) {
      canvas.tabIndex = 0;
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `${name}: ${text}; left and right arrow keys choose the point`);
      canvas.addEventListener("keydown", (event) => {
        const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        if (!step) return;
        event.preventDefault();
        const count = scene.label.length;
        choose((Number(at("point").value) + step + count) % count);
      });
    }
    picture.addEventListener("click", (event) => {
      const area = picture.getBoundingClientRect();
      const x = (event.clientX - area.left) / area.width, y = (event.clientY - area.top) / area.height;
      const ratio = area.width / area.height;
      const far = scene.places.map(([px, py]) => ((px - x) * ratio) ** 2 + (py - y) ** 2);
      choose(far.indexOf(Math.min(...far)));
    });
    map.addEventListener("click", (event) => {
      const area = map.getBoundingClientRect();
      choose(clamp(Math.floor(scene.label.length * (event.clientY - area.top) / area.height), 0, scene.label.length - 1));
    });
    box.append(title, picture, map);
    return box;
  }

  function choose(number) {
    at("point").value = number;
    showPoint();
  }

  function showPoint() {
    const names = panelsOf(), number = Number(at("point").value), count = scene.label.length;
    const held = at("panels");
    const present = [...held.children].map((box) => box.dataset.network);
    if (present.join("\n") !== names.join("\n")) held.replaceChildren(...names.map(panel));
    low = 1;
    for (const name of names) {
      for (let i = 0; i < count * count; i++) low = Math.min(low, cosine(scene.similarity[name].data[4 * i]));
    }
    for (const box of held.children) {
      drawWhere(box.querySelector(".where"), box.dataset.network, number);
      drawMap(box.querySelector(".map"), box.dataset.network, number);
    }
    const ramp = at("ramp").getContext("2d");
    for (let i = 0; i < 256; i++) {
      ramp.fillStyle = `rgb(${data.colours[i].join()})`;
      ramp.fillRect(i, 0, 1, 12);
    }
    at("low").textContent = low.toFixed(2);
    at("high").textContent = "1.00";
    describe(names, number);
  }

  function drawWhere(canvas, name, number) {
    const [height, width] = scene.tile, photo = scene.photo, tiles = scene.everywhere[name].data;
    const tile = new ImageData(width, height);
    for (let i = 0; i < width * height; i++) {
      const colour = colourOf(tiles[4 * (number * width * height + i)]);
      tile.data.set([...colour, 255], 4 * i);
    }
    [canvas.width, canvas.height] = [photo.width, photo.height];
    const context = canvas.getContext("2d");
    context.putImageData(photo, 0, 0);
    context.globalAlpha = 0.75;
    context.drawImage(canvasOf(tile), 0, 0, canvas.width, canvas.height);
    context.globalAlpha = 1;
    const unit = canvas.width / 320;
    scene.places.forEach(([x, y], other) => {
      const same = scene.label[other] === scene.label[number], chosen = other === number;
      context.beginPath();
      context.arc(x * canvas.width, y * canvas.height, unit * (chosen ? 7 : same ? 3.5 : 2), 0, 2 * Math.PI);
      context.lineWidth = unit * (chosen ? 2.5 : 1);
      context.strokeStyle = chosen ? "#fff" : "#000";
      context.fillStyle = `rgb(${data.palette[scene.label[other]].join()})`;
      context.fill();
      context.stroke();
    });
  }

  function drawMap(canvas, name, number) {
    const values = scene.similarity[name].data, count = scene.label.length, size = 4;
    [canvas.width, canvas.height] = [size * count, size * count];
    const small = new ImageData(count, count);
    for (let i = 0; i < count * count; i++) small.data.set([...colourOf(values[4 * i]), 255], 4 * i);
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(canvasOf(small), 0, 0, canvas.width, canvas.height);
    context.fillStyle = "#fff";
    for (let i = 1; i < count; i++) {  // lines between classes
      if (scene.label[i] !== scene.label[i - 1]) {
        context.fillRect(size * i, 0, 1, canvas.height);
        context.fillRect(0, size * i, canvas.width, 1);
      }
    }
    context.strokeStyle = "#e6550d";
    context.lineWidth = 2;
    context.strokeRect(1, size * number, canvas.width - 2, size);
  }

  function describe(names, number) {
    const count = scene.label.length, own = data.classes[scene.label[number]];
    const means = {}, best = {};
    for (const name of names) {
      const sums = {};
      let most = [-2, ""];
      for (let other = 0; other < count; other++) {
        if (other === number) continue;
        const value = cosine(scene.similarity[name].data[4 * (number * count + other)]), label = scene.label[other];
        (sums[label] = sums[label] || []).push(value);
        if (value > most[0]) most = [value, data.classes[label]];
      }
      means[name] = sums;
      best[name] = most;
    }
    const words = names.map((name) => `${name}: ${best[name][1]} (${best[name][0].toFixed(2)})`);
    at("found").textContent = `A point of ${own}. Nearest other point: ${words.join(" · ")}`;
    const cell = (kind, text) => Object.assign(document.createElement(kind), { textContent: text });
    const head = document.createElement("tr");
    head.append(...["class", ...names].map((text) => Object.assign(cell("th", text), { scope: "col" })));
    document.querySelector("#byclass thead").replaceChildren(head);
    document.querySelector("#byclass tbody").replaceChildren(...[...new Set(scene.label)].map((label) => {
      const row = document.createElement("tr");
      row.append(Object.assign(cell("th", data.classes[label]), { scope: "row" }));
      for (const name of names) {
        const values = means[name][label] || [];
        row.append(cell("td", values.length ? (values.reduce((a, b) => a + b) / values.length).toFixed(3) : "-"));
      }
      return row;
    }));
  }

  function setUpStructure() {
    if (!data.structures.length) return Promise.resolve();
    fill(at("scene"), data.structures.map((one, number) => [number, data.pictures[one.picture].name]));
    at("scene").addEventListener("change", showScene);
    for (const id of ["point", "student"]) at(id).addEventListener("change", showPoint);
    return showScene();
  }

  Promise.all([data.pictures.length ? setUpPictures() : null, setUpStructure()]).then(() => {
    document.body.dataset.ready = "yes";
  });
})();
