"use strict";

// Tables: a click on a title sorts by that column, a second one the other way.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const title = button.closest("th"), body = title.closest("table").tBodies[0];
    const before = title.getAttribute("aria-sort"), first = title.classList.contains("number") ? -1 : 1;
    const sign = before ? (before === "ascending" ? -1 : 1) : first;
    for (const other of title.parentElement.children) other.removeAttribute("aria-sort");
    title.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const value = (row) => row.cells[title.cellIndex].dataset.value ?? row.cells[title.cellIndex].textContent;
    const order = (a, b) => {
      const [x, y] = [Number(value(a)), Number(value(b))];
      if (Number.isNaN(x) && Number.isNaN(y)) return value(a).localeCompare(value(b)) * sign;
      return Number.isNaN(x) ? 1 : Number.isNaN(y) ? -1 : (x - y) * sign;
    };
    body.append(...[...body.rows].sort(order));
  });
}

// Confusion matrices: drawn from the cells that are not empty; buttons, a double click or two fingers zoom, a drag moves.
for (const box of document.querySelectorAll(".confusion")) {
  const { names, cells } = JSON.parse(box.querySelector("script").textContent);
  const canvas = box.querySelector("canvas"), readout = box.querySelector(".readout"), count = names.length;
  const totals = new Map(), found = new Map();
  for (const [row, column, number] of cells) {
    totals.set(row, (totals.get(row) ?? 0) + number);
    found.set(row * count + column, number);
  }
  const view = { zoom: 1, x: 0, y: 0 };  // x, y: the first column and row that are seen
  let margin = 0, side = 0, cell = 0, chosen = null;

  const limit = (value, most) => Math.min(Math.max(value, 0), most);
  const shorten = (pen, text) => {
    while (text.length > 1 && pen.measureText(text).width > margin - 8) text = text.slice(0, -2) + "…";
    return text;
  };

  function draw() {
    const density = window.devicePixelRatio || 1, width = canvas.clientWidth, style = getComputedStyle(box);
    canvas.style.height = `${width}px`;
    canvas.width = canvas.height = Math.round(width * density);
    const pen = canvas.getContext("2d"), colour = style.getPropertyValue("--cell"), ink = style.color;
    const named = ((0.72 * width) / count) * view.zoom >= 11;  // names fit beside the cells
    margin = named ? Math.min(150, 0.28 * width) : 24;
    side = width - margin;
    cell = (side / count) * view.zoom;
    view.x = limit(view.x, count - count / view.zoom);
    view.y = limit(view.y, count - count / view.zoom);
    canvas.style.touchAction = view.zoom > 1 ? "none" : "pan-y";
    pen.scale(density, density);
    pen.font = "11px system-ui, sans-serif";
    pen.save();
    pen.beginPath();
    pen.rect(margin, margin, side, side);
    pen.clip();
    const left = (column) => margin + (column - view.x) * cell, top = (row) => margin + (row - view.y) * cell;
    for (const [row, column, number] of cells) {
      if (left(column) > width || left(column + 1) < margin || top(row) > width || top(row + 1) < margin) continue;
      const share = number / totals.get(row);
      pen.fillStyle = `rgba(${colour}, ${0.12 + 0.88 * share})`;
      pen.fillRect(left(column), top(row), Math.max(cell - (cell > 6), 1), Math.max(cell - (cell > 6), 1));
      if (cell >= 26) {
        pen.fillStyle = share > 0.5 ? style.getPropertyValue("--paper") : ink;
        pen.textAlign = "center";
        pen.fillText(number, left(column) + cell / 2, top(row) + cell / 2 + 4);
      }
    }
    if (chosen) {
      pen.strokeStyle = style.getPropertyValue("--s1");
      pen.lineWidth = 2;
      pen.strokeRect(left(chosen[1]), top(chosen[0]), cell, cell);
    }
    pen.restore();
    pen.strokeStyle = style.getPropertyValue("--line");
    pen.strokeRect(margin, margin, side, side);
    pen.fillStyle = style.getPropertyValue("--faint");
    if (!named) {
      pen.textAlign = "center";
      pen.fillText("predicted", margin + side / 2, margin - 8);
      pen.save();
      pen.rotate(-Math.PI / 2);
      pen.fillText("true", -(margin + side / 2), margin - 8);
      pen.restore();
      return;
    }
    for (let i = Math.ceil(view.y - 0.5); i < count && top(i + 0.5) < width; i++) {
      pen.textAlign = "right";
      pen.fillText(shorten(pen, names[i]), margin - 5, top(i) + cell / 2 + 4);
    }
    for (let i = Math.ceil(view.x - 0.5); i < count && left(i + 0.5) < width; i++) {
      pen.save();
      pen.translate(left(i) + cell / 2 + 4, margin - 5);
      pen.rotate(-Math.PI / 2);
      pen.textAlign = "left";
      pen.fillText(shorten(pen, names[i]), 0, 0);
      pen.restore();
    }
  }

  function place(event) {
    const frame = canvas.getBoundingClientRect();
    return [event.clientX - frame.left - margin, event.clientY - frame.top - margin];
  }

  function zoom(factor, [x, y] = [side / 2, side / 2]) {
    const column = view.x + x / cell, row = view.y + y / cell, most = Math.max(1, count / 4);
    view.zoom = Math.min(Math.max(view.zoom * factor, 1), most);
    cell = (side / count) * view.zoom;
    [view.x, view.y] = [column - x / cell, row - y / cell];
    draw();
  }

  function tell(event) {
    const [x, y] = place(event), row = Math.floor(view.y + y / cell), column = Math.floor(view.x + x / cell);
    if (x < 0 || y < 0 || row >= count || column >= count) return;
    const number = found.get(row * count + column) ?? 0, total = totals.get(row) ?? 0;
    chosen = [row, column];
    readout.textContent = `${names[row]} → ${names[column]}: ${number} of ${total}`;
    draw();
  }

  const fingers = new Map();
  canvas.addEventListener("pointerdown", (event) => {
    fingers.set(event.pointerId, event);
    tell(event);
  });
  canvas.addEventListener("pointermove", (event) => {
    const before = fingers.get(event.pointerId);
    if (!before) return event.pointerType === "mouse" ? tell(event) : undefined;
    fingers.set(event.pointerId, event);
    if (fingers.size === 2) {
      const [other] = [...fingers.values()].filter((finger) => finger.pointerId !== event.pointerId);
      const gap = (one) => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY);
      return zoom(gap(event) / Math.max(gap(before), 1), place(event));
    }
    view.x -= (event.clientX - before.clientX) / cell;
    view.y -= (event.clientY - before.clientY) / cell;
    draw();
  });
  for (const name of ["pointerup", "pointercancel", "pointerleave"]) {
    canvas.addEventListener(name, (event) => fingers.delete(event.pointerId));
  }
  canvas.addEventListener("dblclick", (event) => zoom(2, place(event)));
  const [closer, further, whole] = box.querySelectorAll("button");
  closer.addEventListener("click", () => zoom(1.6));
  further.addEventListener("click", () => zoom(1 / 1.6));
  whole.addEventListener("click", () => zoom(0));
  new ResizeObserver(draw).observe(box);
}
