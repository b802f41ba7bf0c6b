//! Plots: lines over a logarithmic axis, as text that a browser shows. Upwards it is logarithmic too where lines would
//! otherwise lie on the ground.

use std::collections::BTreeMap;

use crate::figures::line;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 360.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 170.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 50.0;
/// Of each series, the same in every plot.
const COLOURS: [(&str, &str); 4] =
    [("memory", "#0072b2"), ("redis", "#d55e00"), ("postgres", "#009e73"), ("sqlite", "#cc79a7")];
const COLOUR_OF_OTHERS: &str = "#000000";
/// From this ratio of the largest to the smallest value on, the axis upwards is logarithmic.
const LINEAR_MAX: f64 = 30.0;

/// One plot: points of each series, over what, in what.
pub struct Plot<'a> {
    pub title: &'a str,
    pub across: &'a str,
    pub up: &'a str,
    pub series: BTreeMap<String, Vec<(f64, f64)>>,
}

impl Plot<'_> {
    pub fn svg(&self) -> String {
        let all = || self.series.values().flatten();
        let xs: Vec<f64> = all().map(|(x, _)| *x).collect();
        let (low, high) = all().fold((f64::MAX, 1e-9_f64), |(low, high), (_, y)| (low.min(*y), high.max(*y)));
        let upwards = Upwards::over(low, high);
        // A share of nothing has no logarithm.
        let is_linear = xs.iter().any(|x| *x <= 0.0);
        let scale = |x: f64| if is_linear { x } else { x.log10() };
        let (first, last) =
            xs.iter().fold((f64::MAX, f64::MIN), |(low, high), x| (low.min(scale(*x)), high.max(scale(*x))));
        let span = (last - first).max(1e-9);
        let across = |x: f64| LEFT + (scale(x) - first) / span * (WIDTH - LEFT - RIGHT);
        let up = |y: f64| HEIGHT - BOTTOM - upwards.share(y) * (HEIGHT - TOP - BOTTOM);
        let mut text = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" font-family=\"sans-serif\" \
             font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n"
        );
        let middle = (LEFT + WIDTH - RIGHT) / 2.0;
        line(
            &mut text,
            format_args!("<text x=\"{middle}\" y=\"20\" text-anchor=\"middle\" font-size=\"14\">{}</text>", self.title),
        );
        let foot = HEIGHT - 10.0;
        line(
            &mut text,
            format_args!("<text x=\"{middle}\" y=\"{foot}\" text-anchor=\"middle\">{}</text>", self.across),
        );
        for value in upwards.ticks() {
            let (y, right, label_x) = (up(value), WIDTH - RIGHT, LEFT - 8.0);
            line(
                &mut text,
                format_args!("<line x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>"),
            );
            let (label, y) = (short(value), y + 4.0);
            line(&mut text, format_args!("<text x=\"{label_x}\" y=\"{y:.1}\" text-anchor=\"end\">{label}</text>"));
        }
        let note = if upwards.is_logarithmic { ", logarithmic" } else { "" };
        line(&mut text, format_args!("<text x=\"8\" y=\"{}\">{}{note}</text>", TOP - 12.0, self.up));
        let mut ticks = xs.clone();
        ticks.sort_by(f64::total_cmp);
        ticks.dedup();
        for tick in ticks {
            let (x, y, label) = (across(tick), HEIGHT - BOTTOM + 18.0, short(tick));
            line(&mut text, format_args!("<text x=\"{x:.1}\" y=\"{y}\" text-anchor=\"middle\">{label}</text>"));
        }
        for (index, (name, points)) in self.series.iter().enumerate() {
            let colour =
                COLOURS.iter().find(|(series, _)| series == name).map_or(COLOUR_OF_OTHERS, |(_, colour)| colour);
            let path: Vec<_> = points.iter().map(|(x, y)| format!("{:.1},{:.1}", across(*x), up(*y))).collect();
            let path = path.join(" ");
            line(
                &mut text,
                format_args!("<polyline points=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>"),
            );
            for (x, y) in points {
                let (x, y) = (across(*x), up(*y));
                line(&mut text, format_args!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{colour}\"/>"));
            }
            let (x, y) = (WIDTH - RIGHT + 14.0, TOP + 20.0 * index as f64);
            line(
                &mut text,
                format_args!("<rect x=\"{x}\" y=\"{}\" width=\"12\" height=\"12\" fill=\"{colour}\"/>", y - 10.0),
            );
            line(&mut text, format_args!("<text x=\"{}\" y=\"{y}\">{name}</text>", x + 18.0));
        }
        text.push_str("</svg>\n");
        text
    }
}

/// The axis upwards.
struct Upwards {
    is_logarithmic: bool,
    bottom: f64,
    top: f64,
    step: f64,
}

impl Upwards {
    fn over(low: f64, high: f64) -> Self {
        let is_logarithmic = low > 0.0 && high / low > LINEAR_MAX;
        if is_logarithmic {
            let (bottom, top) = (10_f64.powf(low.log10().floor()), 10_f64.powf(high.log10().ceil()));
            return Self { is_logarithmic, bottom, top, step: 10.0 };
        }
        // The roundest step that makes at most six.
        let scale = 10_f64.powf((high / 6.0).log10().floor());
        let step = [1.0, 2.0, 5.0].map(|digit| digit * scale).into_iter().find(|step| high / step <= 6.0);
        let step = step.unwrap_or(10.0 * scale);
        Self { is_logarithmic, bottom: 0.0, top: (high / step).ceil() * step, step }
    }

    fn share(&self, value: f64) -> f64 {
        if self.is_logarithmic {
            (value / self.bottom).log10() / (self.top / self.bottom).log10()
        } else {
            value / self.top
        }
    }

    fn ticks(&self) -> Vec<f64> {
        let next = |value: &f64| Some(if self.is_logarithmic { value * self.step } else { value + self.step });
        // What was added up may miss the last by a little.
        std::iter::successors(Some(self.bottom), next).take_while(|value| *value <= self.top * 1.001).collect()
    }
}

fn short(value: f64) -> String {
    let value = (value * 10.0).round() / 10.0;
    match value {
        _ if value >= 1_000_000.0 => format!("{}M", value / 1_000_000.0),
        _ if value >= 1_000.0 && value % 100.0 == 0.0 => format!("{}k", value / 1_000.0),
        // A power of two is known by its digits.
        _ if value >= 1_000.0 => format!("{},{:03}", (value / 1_000.0).floor(), value % 1_000.0),
        _ => format!("{value}"),
    }
}
