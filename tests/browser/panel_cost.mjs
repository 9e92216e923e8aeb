// Measures what the panel at `url` costs, and prints one JSON object: node panel_cost.mjs URL PID STAGE CHROMIUM SECONDS
// PID: process of the server. STAGE: run/stage that is watched. SECONDS: length of each look at the server's CPU time.

import { readFile } from "node:fs/promises";
import { chromium } from "playwright-core";

const [url, pid, stage, executablePath, seconds] = process.argv.slice(2);
const TICKS = 100; // of the system's clock in a second
const SETTLE = 4_000; // ms until what a page has asked for is done
const VIEWS = 9; // in a browser that knows the page; an odd number
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

// Milliseconds from the call of a page to the frame that shows a row of the table. Waiting for an element from here
// would add up to half a second: it looks again ever less often.
async function view() {
  await page?.close();
  page = await context.newPage();
  await page.addInitScript(() => {
    const look = () => {
      const cells = [...document.querySelectorAll("#panel-table td")];
      const isThere = cells.some((cell) => cell.checkVisibility() && cell.textContent.includes("/pretrain"));
      requestAnimationFrame(isThere ? () => (window.shown = performance.now()) : look);
    };
    requestAnimationFrame(look);
  });
  await page.goto(url, { waitUntil: "commit" });
  await page.waitForFunction(() => window.shown, null, { polling: 100 });
  return Math.round(await page.evaluate(() => window.shown));
}

found["first view, new browser, ms"] = await view();
const later = [];
for (let i = 0; i < VIEWS; i++) later.push(await view());
later.sort((a, b) => a - b);
found[`${VIEWS} later views, median, ms`] = later[(VIEWS - 1) / 2];
found["slowest of them, ms"] = later.at(-1);
found["table of runs open, %"] = await share();
await page.locator("#panel-open input").first().fill(stage);
await page.getByRole("option", { name: stage, exact: true }).first().click();
await page.locator("#panel-run svg").first().waitFor();
found["one run watched, %"] = await share();
await browser.close();
console.log(JSON.stringify(found));
