/* what is shown, as the address says it after the #; runAbout is what the server says of the run */
const DEFAULTS = { run: "", latent: "", picture: "", sort: "", order: "desc", q: "", label: "", least: "", overlay: "1", heat: "", value: "" };
const state = { ...DEFAULTS };
let runAbout = null;
let runs = [];

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const name of Object.keys(DEFAULTS)) state[name] = given.get(name) ?? DEFAULTS[name];
}

/* change the state, write it into the address, and show it; leave a step in the history when a page changes */
function go(changes, asked = true) {
  hush();
  const step = asked && ["run", "latent", "picture"].some((name) => name in changes && changes[name] !== state[name]);
  Object.assign(state, changes);
  const kept = Object.entries(state).filter(([name, value]) => String(value) !== DEFAULTS[name]);
  const address = "#" + new URLSearchParams(kept).toString().replaceAll("%3A", ":");
  history[step ? "pushState" : "replaceState"](null, "", address);
  show().catch(failed);
}

/* where the page itself is: a proxy may show it below a prefix, with or without a slash behind it */
const HOME = location.pathname.replace(/\/*$/, "/");
const api = (rest = "") => `${HOME}api/runs/${runNumber()}${rest}`;
/* an address names a run, so that it leads to the same latent whatever other runs are open; the first without */
const runNumber = () => Math.max(0, runs.findIndex((run) => run.name === state.run));
/* what the run suggests, where the address says nothing else */
const sortedBy = () => (state.sort === "latent" || runAbout.columns.some((c) => c.name === state.sort) ? state.sort : runAbout.sort);
const least = () => (state.least === "" ? String(runAbout.least) : state.least);
/* image:12 or upload:0 as the server's path */
const pictureApi = (picked) => api("/" + picked.replace("image:", "images/").replace("upload:", "uploads/"));
const overlayOn = () => state.overlay === "1" && runAbout.patches;

/* the address of a picture, with a latent's patches lit where one is given */
function source(picked, latent = null, size = 96) {
  const over = latent === null ? "/picture" : `/over/${latent}`;
  return `${pictureApi(picked)}${over}?size=${size}${latent !== null && state.heat ? "&heat=1" : ""}&v=${runAbout.version}`;
}
function image(picked, latent = null, size = 96, alt = "") {
  const made = el("img", { src: source(picked, latent, size), alt, loading: "lazy", decoding: "async" });
  made.addEventListener("load", () => made.classList.toggle("small", made.naturalWidth <= 64));
  return made;
}
/* a picture that leads to its own page */
function figure(item, caption, latent = null, focus = "") {
  const picked = `image:${item.image}`;
  const open = el("button", { type: "button", title: `Picture ${item.image}`, onclick: () => go({ picture: picked, latent: String(focus), value: "" }) });
  const shown = image(picked, latent, 288, item.label || `picture ${item.image}`);
  open.append(shown);
  if (latent !== null) { // plain while pointed at
    open.addEventListener("pointerenter", () => (shown.src = source(picked, null, 288)));
    open.addEventListener("pointerleave", () => (shown.src = source(picked, latent, 288)));
  }
  return el("figure", {}, open, el("figcaption", {}, el("span", {}, item.label), el("span", {}, caption)));
}
