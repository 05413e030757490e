//! When a lane has more to do than it can: then new actions are refused while they
//! wait for nothing yet, so that those who are let in are answered in time.
//!
//! After CoDel (RFC 8289): a queue that is long for a moment does its work, a burst
//! is taken in; one whose head is late for a whole interval only adds to everybody's
//! waiting. From then on no more may wait than is decided in [`KEPT`], until the queue
//! has been short for a while.

use std::time::Duration;

use tokio::time::Instant;

/// Who has waited longer than this was late.
const LATE: Duration = Duration::from_millis(100);
/// How long all must have been late before anything is refused.
const INTERVAL: Duration = Duration::from_millis(100);
/// How long those wait who are let in then.
const KEPT: Duration = Duration::from_millis(8);
/// How long waits must have been under half of that before all are let in again.
const CALM: Duration = Duration::from_millis(500);
/// So many may always wait: a batch's worth.
const LEAST: f64 = 64.0;

/// A lane's judgement on its queue. Told of every batch that is taken.
#[derive(Debug, Default)]
pub(super) struct Shedding {
    last_take: Option<(Instant, usize)>,
    late_since: Option<Instant>,
    /// While it refuses.
    refusing: Option<Refusing>,
}

#[derive(Debug)]
struct Refusing {
    /// Commands decided a second, as the last batches say.
    rate: f64,
    calm_since: Option<Instant>,
}

impl Shedding {
    /// Notes a batch: when the one that waited longest was put, and how many there are.
    #[expect(
        clippy::cast_precision_loss,
        clippy::float_arithmetic,
        reason = "a rate; no amount of any budget is computed here"
    )]
    pub(super) fn taken(&mut self, now: Instant, oldest: Instant, count: usize) {
        let wait = now.saturating_duration_since(oldest);
        let rate = self.last_take.replace((now, count)).map(|(at, before)| {
            let took = now.saturating_duration_since(at).as_secs_f64();
            before as f64 / took.max(1e-4)
        });
        if wait <= LATE {
            self.late_since = None;
        } else {
            let since = *self.late_since.get_or_insert(now);
            if now - since >= INTERVAL && self.refusing.is_none() {
                self.refusing = Some(Refusing {
                    rate: rate.unwrap_or(0.0),
                    calm_since: None,
                });
            }
        }
        if let (Some(refusing), Some(rate)) = (&mut self.refusing, rate) {
            refusing.rate += (rate - refusing.rate) / 8.0;
        }
        self.waited(now, wait);
    }

    /// Ends the refusing once waits have been short for long enough.
    fn waited(&mut self, now: Instant, wait: Duration) {
        let Some(refusing) = &mut self.refusing else {
            return;
        };
        if wait > KEPT / 2 {
            refusing.calm_since = None;
        } else if now - *refusing.calm_since.get_or_insert(now) >= CALM {
            self.refusing = None;
        }
    }

    /// Notes that nothing is waiting. In the middle of an overload that can be so for a
    /// moment.
    pub(super) fn idle(&mut self, now: Instant) {
        self.last_take = None;
        self.late_since = None;
        self.waited(now, Duration::ZERO);
    }

    /// How many may wait; nothing while it refuses none.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::float_arithmetic,
        reason = "a rate, never negative"
    )]
    pub(super) fn most(&self) -> Option<usize> {
        let refusing = self.refusing.as_ref()?;
        Some((refusing.rate * KEPT.as_secs_f64()).max(LEAST) as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BATCH: Duration = Duration::from_millis(5);

    /// Batches of 100 commands, one every 5 ms, for so long.
    fn batches(shedding: &mut Shedding, now: &mut Instant, wait: Duration, lasting: Duration) {
        let end = *now + lasting;
        while *now < end {
            *now += BATCH;
            shedding.taken(*now, now.checked_sub(wait).expect("a time"), 100);
        }
    }

    #[tokio::test]
    async fn a_burst_is_taken_in_and_a_standing_queue_is_not() {
        let mut now = Instant::now() + Duration::from_secs(10);
        let mut shedding = Shedding::default();
        let ms = Duration::from_millis;
        batches(&mut shedding, &mut now, ms(300), ms(90));
        assert_eq!(shedding.most(), None, "it may be a burst");
        batches(&mut shedding, &mut now, ms(50), ms(50));
        batches(&mut shedding, &mut now, ms(300), ms(90));
        assert_eq!(shedding.most(), None, "so it was");
        batches(&mut shedding, &mut now, ms(300), ms(50));
        assert_eq!(shedding.most(), Some(160), "20,000 a second for 8 ms");
        batches(&mut shedding, &mut now, ms(8), ms(10_000));
        assert!(shedding.most().is_some(), "as long as it lasts");
        batches(&mut shedding, &mut now, ms(4), ms(490));
        assert!(shedding.most().is_some(), "not yet");
        batches(&mut shedding, &mut now, ms(4), ms(30));
        assert_eq!(shedding.most(), None, "it is over");
    }

    #[tokio::test]
    async fn an_empty_moment_is_not_the_end_and_half_a_second_is() {
        let mut now = Instant::now() + Duration::from_secs(10);
        let mut shedding = Shedding::default();
        let ms = Duration::from_millis;
        batches(&mut shedding, &mut now, ms(300), ms(200));
        shedding.idle(now);
        assert!(shedding.most().is_some());
        batches(&mut shedding, &mut now, ms(30), ms(200));
        shedding.idle(now);
        shedding.idle(now + CALM);
        assert_eq!(shedding.most(), None);
    }
}
