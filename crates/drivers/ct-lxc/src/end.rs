//! Why a container ended. Pure.

use crate::proc::InitEnd;
use karst_guest::keeper::{self, End, Exit, Requested, Status};
use karst_model::instance::ExitReason;

/// What a status found without a living keeper means.
pub(crate) fn ended(status: Status) -> End {
    match status.state {
        keeper::State::Exited | keeper::State::Failed => End::Exited(status),
        _ => End::KeeperLost(Some(status)),
    }
}

/// Why a guest ended, by what its keeper and `lxc-start`'s log say.
pub(crate) fn exit_reason(end: &End, init: Option<InitEnd>) -> Option<ExitReason> {
    let crashed = |detail: String| Some(ExitReason::Crashed { detail });
    match end {
        End::KeeperLost(_) => crashed("its keeper was killed".into()),
        End::Exited(s) => match (s.requested, s.exit, init) {
            (Requested::Force | Requested::Deadline, ..) => Some(ExitReason::Forced),
            (Requested::Shutdown, ..) => Some(ExitReason::Shutdown),
            (_, Some(Exit::Signal(n)), _) => crashed(format!("lxc-start was ended by signal {n}")),
            // The kernel ends a namespace's init with this signal when it asks for a halt or power-off.
            (_, _, Some(InitEnd::Signal(libc::SIGINT))) => Some(ExitReason::Shutdown),
            (_, _, Some(InitEnd::Signal(n))) => crashed(format!("its init was ended by signal {n}")),
            (_, _, Some(InitEnd::Code(n))) => crashed(format!("its init ended with code {n}")),
            (_, Some(Exit::Code(0)), None) => Some(ExitReason::Shutdown),
            (_, Some(Exit::Code(n)), None) => crashed(format!("lxc-start ended with code {n}")),
            (_, None, None) => crashed(s.reason.clone()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn why_it_ended() {
        let end = |requested, exit, init| {
            exit_reason(&End::Exited(Status { requested, exit: Some(exit), ..Status::default() }), init)
        };
        let (none, zero) = (Requested::Nobody, Exit::Code(0));
        assert_eq!(end(none, zero, None), Some(ExitReason::Shutdown));
        assert_eq!(end(none, zero, Some(InitEnd::Signal(2))), Some(ExitReason::Shutdown));
        assert_eq!(end(Requested::Shutdown, Exit::Code(1), None), Some(ExitReason::Shutdown));
        assert_eq!(end(Requested::Force, zero, Some(InitEnd::Signal(9))), Some(ExitReason::Forced));
        let crash = end(none, zero, Some(InitEnd::Signal(9)));
        assert!(matches!(crash, Some(ExitReason::Crashed { detail }) if detail.contains("signal 9")));
        let crash = end(none, zero, Some(InitEnd::Code(3)));
        assert!(matches!(crash, Some(ExitReason::Crashed { detail }) if detail.contains("code 3")));
        let lost = exit_reason(&End::KeeperLost(None), None);
        assert!(matches!(lost, Some(ExitReason::Crashed { .. })));
    }
}
