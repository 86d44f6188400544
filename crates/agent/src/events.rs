//! Delivery of events to any number of bounded queues.

use crate::calls::AgentEvent;
use karst_env::Mutex;
use tokio::sync::mpsc;

/// Events that a receiver may be behind.
pub const EVENT_QUEUE: usize = 1024;

/// Room that news of machines leave in a queue for everything else.
const RESERVED: usize = EVENT_QUEUE / 2;

/// Hands each event to every receiver. The last place of a queue is kept for [`AgentEvent::Lost`]: a receiver that falls
/// behind finds it after the events that it still gets, and then whatever happened after it made room. News of machines take
/// half of it at most: what guests cause displaces nothing that is to be known of them.
#[derive(Debug, Default)]
pub struct EventHub {
    receivers: Mutex<Vec<mpsc::Sender<AgentEvent>>>,
}

impl EventHub {
    /// A new receiver.
    pub fn subscribe(&self) -> mpsc::Receiver<AgentEvent> {
        let (sender, receiver) = mpsc::channel(EVENT_QUEUE);
        let mut receivers = self.receivers.lock();
        receivers.retain(|r| !r.is_closed());
        receivers.push(sender);
        receiver
    }

    /// Hands out one event.
    pub fn publish(&self, event: &AgentEvent) {
        let may_be_missed = matches!(event, AgentEvent::Machine { .. });
        self.receivers.lock().retain(|receiver| match receiver.capacity() {
            left if may_be_missed && left <= RESERVED => !receiver.is_closed(),
            0 => !receiver.is_closed(),
            1 => !matches!(receiver.try_send(AgentEvent::Lost), Err(mpsc::error::TrySendError::Closed(_))),
            _ => !matches!(receiver.try_send(event.clone()), Err(mpsc::error::TrySendError::Closed(_))),
        });
    }

    /// Does anybody listen?
    pub fn is_empty(&self) -> bool {
        self.receivers.lock().iter().all(|r| r.is_closed())
    }

    /// Ends all subscriptions: receivers see the end of their queue.
    pub fn close(&self) {
        self.receivers.lock().clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_receiver_is_told_that_it_lost_some() {
        let hub = EventHub::default();
        let mut slow = hub.subscribe();
        let event = AgentEvent::ImageProgress {
            image: karst_model::ImageId(uuid::Uuid::nil()),
            stage: "x".into(),
            percent: None,
        };
        for _ in 0..EVENT_QUEUE * 2 {
            hub.publish(&event);
        }
        let got: Vec<_> = std::iter::from_fn(|| slow.try_recv().ok()).collect();
        assert_eq!(got.len(), EVENT_QUEUE);
        assert_eq!(got.last(), Some(&AgentEvent::Lost));
        assert!(got[..EVENT_QUEUE - 1].iter().all(|e| *e == event));
        hub.publish(&event);
        assert_eq!(slow.try_recv().ok(), Some(event.clone()));
        // What guests cause leaves room for what is to be known of them.
        let instance = karst_model::InstanceId(uuid::Uuid::nil());
        let what = karst_model::news::Happened::Reset;
        let news = AgentEvent::Machine { news: karst_model::news::MachineNews { instance, what } };
        for _ in 0..EVENT_QUEUE * 2 {
            hub.publish(&news);
        }
        hub.publish(&event);
        let got: Vec<_> = std::iter::from_fn(|| slow.try_recv().ok()).collect();
        assert_eq!(got.len(), EVENT_QUEUE - RESERVED + 1);
        assert!(got[..got.len() - 1].iter().all(|e| *e == news) && got.last() == Some(&event));
        drop(slow);
        hub.publish(&AgentEvent::Lost);
        assert!(hub.is_empty());
    }
}
