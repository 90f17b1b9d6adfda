// The views of what a team shares: the fleet, who used what, and keys.

import { h } from "./dom.js";
import { t } from "./i18n.js";

const TABS = ["workers", "usage", "keys"];

/** The links between these views; `here` is the one that is shown. */
export function teamTabs(here) {
  return h("nav", { class: "tabs", "aria-label": t("team.title") }, TABS.map((name) => h("a", { href: `#/${name}`, "aria-current": name === here ? "page" : null }, t(`tab.${name}`))));
}
