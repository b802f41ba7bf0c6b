//! What an exploration found, for assertions and for people.

use std::fmt;

/// Where a process died, or stood still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    kind: PointKind,
    name: Option<&'static str>,
}

/// What kind of point it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum PointKind {
    /// No crash: the event was delivered several times, before and after.
    Copies,
    /// When the handler waited for the n-th time, from 1. With a transactional handler beginning, recording and
    /// committing are awaited too.
    Await(usize),
    /// The handler had returned, and nothing else had happened yet.
    Returned,
    /// What it published was sent; its record was on its way. With a transactional handler: its commit.
    BeforeRecord,
    /// The record was written; the ack was on its way.
    BeforeAck,
}

impl Point {
    pub(super) fn new(kind: PointKind, name: Option<&'static str>) -> Self {
        Self { kind, name }
    }

    /// What kind of point it is.
    pub fn kind(&self) -> PointKind {
        self.kind
    }

    /// The name of the [`crash_point`](crate::crash_point) that was awaited, if it was one.
    pub fn name(&self) -> Option<&'static str> {
        self.name
    }
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            PointKind::Copies => f.write_str("no crash, but copies of the delivery")?,
            PointKind::Await(number) => write!(f, "await point {number}")?,
            PointKind::Returned => f.write_str("after the handler returned")?,
            PointKind::BeforeRecord => f.write_str("before the record reached the store")?,
            PointKind::BeforeAck => f.write_str("before the ack reached the broker")?,
        }
        self.name.map_or(Ok(()), |name| write!(f, " ({name})"))
    }
}

/// A point after which something else is left behind than by a single run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Where.
    pub point: Point,
    /// What differs: `state` (what the test reads), `published` (what was sent, without repeats under one id) or `end`
    /// (processed, dead-lettered).
    pub what: &'static str,
    /// What a single run leaves behind.
    pub expected: String,
    /// What was left behind here.
    pub actual: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  {}: another {}", self.point, self.what)?;
        let (expected, actual): (Vec<_>, Vec<_>) = (self.expected.lines().collect(), self.actual.lines().collect());
        let least = expected.len().min(actual.len());
        let start = expected.iter().zip(&actual).take_while(|(a, b)| a == b).count();
        let end =
            expected.iter().rev().zip(actual.iter().rev()).take(least - start).take_while(|(a, b)| a == b).count();
        for line in &expected[start..expected.len() - end] {
            writeln!(f, "    - {line}")?;
        }
        for line in &actual[start..actual.len() - end] {
            writeln!(f, "    + {line}")?;
        }
        Ok(())
    }
}

/// What an exploration found. [`Display`](fmt::Display) tells it.
#[derive(Clone, Debug)]
pub struct Report {
    ty: Box<str>,
    single: String,
    points: Vec<Point>,
    differences: Vec<Difference>,
    paused: usize,
    overlapping: Vec<Difference>,
}

type Unlike = Vec<(&'static str, String, String)>;

impl Report {
    pub(super) fn new(ty: &str, single: String) -> Self {
        let (points, differences, overlapping) = (Vec::new(), Vec::new(), Vec::new());
        Self { ty: ty.into(), single, points, differences, paused: 0, overlapping }
    }

    pub(super) fn add(&mut self, point: Point, unlike: Unlike) {
        self.differences.extend(differences(point, unlike));
        self.points.push(point);
    }

    pub(super) fn add_overlapping(&mut self, point: Point, unlike: Unlike) {
        self.overlapping.extend(differences(point, unlike));
        self.paused += 1;
    }

    /// The points at which the process died, in the order of the handler.
    pub fn points(&self) -> &[Point] {
        &self.points
    }

    /// What differs after a crash, in the order of the points.
    pub fn differences(&self) -> &[Difference] {
        &self.differences
    }

    /// What differs after a pause beyond the lease, if [`Explore::overlapping`](super::Explore::overlapping) asked.
    pub fn overlapping(&self) -> &[Difference] {
        &self.overlapping
    }

    /// What a single run leaves behind, as its `Debug` form.
    pub fn single(&self) -> &str {
        &self.single
    }

    /// No crash makes a difference.
    ///
    /// # Panics
    /// If one does, with the whole report.
    #[track_caller]
    pub fn assert_effects_once(&self) {
        assert!(self.differences.is_empty(), "{self}");
    }

    /// Neither a crash nor a pause makes a difference.
    ///
    /// # Panics
    /// If one does, or if pauses were not explored; with the whole report.
    #[track_caller]
    pub fn assert_effects_once_though_paused(&self) {
        assert!(self.paused > 0, "no pause was explored: call .overlapping() before .read(..)\n{self}");
        assert!(self.differences.is_empty() && self.overlapping.is_empty(), "{self}");
    }
}

fn differences(point: Point, unlike: Unlike) -> impl Iterator<Item = Difference> {
    let of = move |(what, expected, actual)| Difference { point, what, expected, actual };
    unlike.into_iter().map(of)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |all: &[Difference]| {
            let mut at: Vec<_> = all.iter().map(|difference| &difference.point).collect();
            at.dedup();
            at.len()
        };
        let Self { ty, points, differences, paused, overlapping, .. } = self;
        writeln!(f, "{ty}: {} points explored, {} make a difference", points.len(), count(differences))?;
        differences.iter().try_for_each(|difference| difference.fmt(f))?;
        if *paused > 0 {
            writeln!(f, "paused beyond the lease at {paused} points, {} make a difference", count(overlapping))?;
            overlapping.iter().try_for_each(|difference| difference.fmt(f))?;
        }
        Ok(())
    }
}
