const $ = (id) => document.getElementById(id);

/* el("b.name", {title: "…"}, "text", child): an element; text is never read as HTML */
function el(what, attributes = {}, ...children) {
  const [tag, ...classes] = what.split(".");
  const made = document.createElement(tag || "div");
  if (classes.length) made.className = classes.join(" ");
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made && typeof value !== "string") made[name] = value;
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const fill = (box, ...children) => box.replaceChildren(...children.filter((child) => child !== null));

function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function figures(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size && size < 0.001) return value.toPrecision(2);
  return value.toFixed(size >= 1 ? Math.max(0, digits - Math.ceil(Math.log10(size + 1e-9))) : digits);
}
const whole = (value) => value.toLocaleString("en");
const latentName = (row) => row.name || `latent ${row.latent}`;

/* bars, one a figure, as high as the share of latents that it exceeds */
function sparkline(columns, percentiles, sorted) {
  const step = 66 / Math.max(columns.length, 1);
  const bars = columns.map((column, i) => {
    const share = percentiles[column.name];
    const height = share === null ? 0 : 2 + 28 * share;
    const title = svg("title");
    title.textContent = `${column.title}: ` + (share === null ? "none" : `above ${Math.round(100 * share)} % of latents`);
    return svg("rect", { x: i * step, y: 30 - height, width: Math.max(2, step - 2), height, class: column.name === sorted ? "on" : "" }, title);
  });
  return svg("svg", { class: "spark", viewBox: "0 0 66 30", "aria-hidden": "true" }, ...bars);
}

async function ask(path, options = {}) {
  const answer = await fetch(path, options).catch((error) => {
    throw error.name === "AbortError" ? error : new Error("The explorer does not answer; is it still running?");
  });
  const text = await answer.text();
  let found;
  try {
    found = JSON.parse(text);
  } catch {
    throw new Error(`${new URL(path, location)} answered with status ${answer.status}, but not as the explorer does: does a proxy or a login stand between?`);
  }
  if (!answer.ok) throw new Error(found.error);
  return found;
}
const post = (path, body) => ask(path, { method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body) });

let toastEnds;
/* a line at the foot of the page, for a while; an error stays until it is clicked or something else is asked for */
function toast(text, stays = false) {
  $("toast").textContent = text;
  $("toast").hidden = false;
  clearTimeout(toastEnds);
  if (!stays) toastEnds = setTimeout(hush, 7000);
}
function hush() {
  $("toast").hidden = true;
}
function failed(error) {
  if (error.name === "AbortError") return;
  toast(error.message, true);
  for (const box of document.querySelectorAll(".waiting")) { // what was waited for does not come
    box.textContent = error.message;
    box.classList.replace("waiting", "failed");
  }
}
