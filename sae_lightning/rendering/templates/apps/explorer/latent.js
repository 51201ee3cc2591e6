/* the page of one latent */
const BANDS = { top: "its strongest pictures", middle: "in the middle of those it fires on", bottom: "its weakest" };

async function showLatent() {
  const latent = state.latent, found = await ask(api(`/latents/${latent}`));
  if (state.latent !== latent || state.picture) return;
  const over = overlayOn() ? latent : null;
  const share = found.classes.length ? found.classes[0] : null;
  fill($("detail"),
    el("div.head", {}, backButton(), el("h2", {}, found.name || `Latent ${latent}`, found.name ? el("small", {}, `latent ${latent}`) : null), el("span.grow"), overlayButton()),
    el("p.soft", {}, `Fires on ${whole(found.images_fired)} of ${whole(runAbout.n_images)} ${runAbout.split} pictures` +
      (share ? `, ${Math.round(100 * share.share)} % of them ${share.label}.` : ".")),
    el("div.tiles", {}, ...runAbout.columns.map((column) => tile(column, found))),
    ...(found.bands.length ? found.bands.flatMap((band) => bandOf(band, over, latent)) : [el("p", {}, "It fires on no picture of this split.")]),
    el("div.sides", {}, el("div", {}, el("h3", {}, "Activations", el("small", {}, "pictures, from 0 to its peak")), histogram(found.histogram)),
      found.classes.length ? el("div", {}, el("h3", {}, "Classes", el("small", {}, "of the pictures it fires on")), bars(found.classes)) : null),
    el("h3", {}, "Alike", el("small", {}, "latents of similar decoder direction")),
    el("div.chips", {}, ...found.similar.map((other) => chip(other, figures(other.cosine, 2), () => go({ latent: String(other.latent) })))),
    keys());
}

function tile(column, found) {
  const share = found.percentiles[column.name], fill = el("i");
  fill.style.width = `${100 * (share ?? 0)}%`;
  const title = column.about + (share === null ? "" : ` Above ${Math.round(100 * share)} % of latents.`);
  return el(column.name === sortedBy() ? "div.tile.on" : "div.tile", { title },
    el("span", {}, column.title), el("b", {}, figures(found.values[column.name])), el("div.meter", {}, fill));
}

function bandOf(band, over, latent) {
  return [
    el("h3", {}, band.name[0].toUpperCase() + band.name.slice(1), el("small", {}, BANDS[band.name])),
    el("div.pics", {}, ...band.images.map((item) => figure(item, figures(item.value), over, latent))),
  ];
}

function histogram(counts) {
  const most = Math.max(...counts, 1), step = 480 / counts.length;
  const rects = counts.map((count, i) => {
    const height = count ? 2 + (86 * count) / most : 0, title = svg("title");
    title.textContent = `${whole(count)} pictures`;
    return svg("rect", { x: i * step, y: 92 - height, width: step - 2, height }, title);
  });
  return svg("svg", { class: "histogram", viewBox: "0 0 480 92", preserveAspectRatio: "none" }, ...rects);
}

function bars(classes) {
  return el("div.bars", {}, ...classes.flatMap((c) => {
    const bar = el("i");
    bar.style.width = `${100 * c.share}%`;
    return [el("span", {}, c.label), el("div", {}, bar), el("span.share", {}, `${Math.round(100 * c.share)} %`)];
  }));
}

/* a latent as a button, with its strongest picture */
function chip(row, figure, onclick, pressed = null, picture = null) {
  const shown = picture ?? (row.images?.length ? image(`image:${row.images[0]}`) : el("span"));
  return el("button.chip", { type: "button", onclick, "aria-pressed": pressed === null ? null : String(pressed), title: `Latent ${row.latent}` },
    shown, el("b", {}, latentName(row)), el("small", {}, figure));
}

const backButton = () => el("button.back", { type: "button", onclick: () => go({ latent: "", picture: "" }) }, "‹ All");
const toggleOverlay = () => go({ overlay: state.overlay === "1" ? "0" : "1" });
const toggleHeat = () => go({ heat: state.heat ? "" : "1", overlay: "1" });
function overlayButton() {
  if (!runAbout.patches) return el("span.soft", {}, "whole pictures, no patches");
  return el("span.head", {},
    el("button", { type: "button", title: "Outline the patches on which it fires (o)", "aria-pressed": String(state.overlay === "1"), onclick: toggleOverlay }, "Patches"),
    el("button", { type: "button", title: "Tint them by how strongly it fires (h)", "aria-pressed": String(Boolean(overlayOn() && state.heat)), onclick: toggleHeat }, "Heat"));
}
const keys = () => el("p.keys.soft", {}, ...["j", "k", " next and previous latent  ", "/", " search  ", "o", " patches  ", "h", " heat  ", "u", " upload  ", "Esc", " back"]
  .map((text) => (text.startsWith(" ") ? text : el("kbd", {}, text))));
