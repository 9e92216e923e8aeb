// Measures what the panel at `url` costs, and prints one JSON object: node panel_cost.mjs URL PID STAGE CHROMIUM SECONDS
// PID: process of the server. STAGE: run/stage that is watched. SECONDS: length of each look at the server's CPU time.

import { readFile } from "node:fs/promises";
import { chromium } from "playwright-core";

const [url, pid, stage, executablePath, seconds] = process.argv.slice(2);
const TICKS = 100; // of the system's clock in a second
const SETTLE = 4_000; // ms until what a page has asked for is done
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function spent() {
  const fields = (await readFile(`/proc/${pid}/stat`, "utf8")).split(") ")[1].split(" ");
  return (Number(fields[11]) + Number(fields[12])) / TICKS;
}

// Percent of a core that the server takes.
async function share() {
  await sleep(SETTLE);
  const before = await spent();
  await sleep(1000 * seconds);
  return Number(((100 * ((await spent()) - before)) / seconds).toFixed(2));
}

const found = { "idle, %": await share() };
const browser = await chromium.launch({ executablePath, headless: true, args: ["--no-sandbox", "--disable-gpu"] });
const context = await browser.newContext({ viewport: { width: 1280, height: 800 } });
let page;
for (const view of ["first view, new browser, ms", "second view, ms", "third view, ms"]) {
  await page?.close();
  page = await context.newPage();
  const start = Date.now();
  await page.goto(url, { waitUntil: "commit" });
  await page.locator("#panel-table").getByText("/pretrain").locator("visible=true").first().waitFor();
  found[view] = Date.now() - start;
}
found["table of runs open, %"] = await share();
await page.locator("#panel-open input").first().fill(stage);
await page.getByRole("option", { name: stage, exact: true }).first().click();
await page.locator("#panel-run svg").first().waitFor();
found["one run watched, %"] = await share();
await browser.close();
console.log(JSON.stringify(found));
