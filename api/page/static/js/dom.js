// Makes elements. Text goes in as text nodes only: nothing here, or anywhere on the page, parses HTML.

const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set(["svg", "path", "line", "rect", "circle", "g", "polyline", "text", "title"]);

/** An element. `on*` are listeners, `css` custom properties and styles, `data` a dataset; null and false are left out. */
export function h(tag, attributes = {}, ...children) {
  const element = SVG_TAGS.has(tag) && tag !== "title" ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "css") for (const [key, style] of Object.entries(value)) element.style.setProperty(key, style);
    else if (name === "data") Object.assign(element.dataset, value);
    else if (name === "value" || name === "checked" || name === "selected" || name === "disabled") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  append(element, children);
  return element;
}

export function append(element, children) {
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false) continue;
    element.append(child instanceof Node ? child : String(child));
  }
}

/** Put new children in the place of the old ones. */
export function fill(element, ...children) {
  element.replaceChildren();
  append(element, children);
  return element;
}

/** Put new children in the place of the old ones; what had the keyboard gives it to its successor, by `data-focus`. */
export function redraw(element, ...children) {
  const active = document.activeElement;
  const focused = active instanceof HTMLElement && element.contains(active) ? active.dataset.focus : undefined;
  fill(element, ...children);
  if (focused) element.querySelector(`[data-focus="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
  return element;
}

/** Text that is somebody's and not the page's: names, completions, numbers. It is not translated. */
export function raw(text, attributes = {}) {
  return h("span", { translate: "no", ...attributes }, text);
}

/** A function that runs at most once in `ms`, and once more after the last call. */
export function throttle(call, ms) {
  /** @type {number | null} */
  let timer = null;
  let again = false;
  const run = () => {
    timer = setTimeout(() => {
      timer = null;
      if (again) {
        again = false;
        run();
        call();
      }
    }, ms);
  };
  return () => {
    if (timer !== null) {
      again = true;
      return;
    }
    run();
    call();
  };
}
