//! Disks of a virtual machine that are copied while it runs.

use super::*;
use karst_model::{
    guest::{DiskCopyEnd, DiskCopyPhase, DiskCopyState, StopMode},
    instance::RuntimeState,
};

/// A machine that runs, and the volume that is its root.
struct Machine<'a> {
    s: &'a Subject,
    guest: GuestRef,
}

impl Machine<'_> {
    async fn volume(&self, pool: PoolId, size: ByteSize) -> VolumeRef {
        let spec = VolumeSpec { size: Some(size), ..self.s.volume(pool, InstanceKind::VirtualMachine, None) };
        let at = VolumeRef { pool, volume: spec.id };
        self.s.agent.volume_create(&self.s.change(), spec).await.unwrap();
        at
    }

    async fn begin(&self, from: VolumeRef, to: VolumeRef, speed: u64) -> Result<()> {
        let request = MachineCopyBegin { guest: self.guest, from, to, speed, synchronous: false };
        self.s.agent.machine_copy_begin(&self.s.change(), request).await
    }

    async fn state(&self, to: VolumeRef) -> DiskCopyState {
        let copy = MachineCopyRef { instance: self.guest.instance, to: to.volume };
        self.s.agent.machine_copy_state(&self.s.read(), copy).await.unwrap()
    }

    async fn end(&self, from: VolumeRef, to: VolumeRef, end: DiskCopyEnd) -> Result<()> {
        let request = MachineCopyEnd { instance: self.guest.instance, from, to, end };
        self.s.agent.machine_copy_end(&self.s.change(), request).await
    }

    async fn speed(&self, to: VolumeRef, speed: u64) -> Result<()> {
        let copy = MachineCopyRef { instance: self.guest.instance, to: to.volume };
        self.s.agent.machine_copy_speed(&self.s.change(), MachineCopySpeed { copy, speed }).await
    }

    async fn until_ready(&self, to: VolumeRef) {
        let limit = self.s.boot.max(Duration::from_secs(120));
        self.s
            .until("the copy", limit, async || {
                (self.state(to).await.phase == DiskCopyPhase::Ready).then_some(())
            })
            .await;
    }

    async fn delete(&self, at: VolumeRef) -> Result<()> {
        self.s.agent.volume_delete(&self.s.change(), at).await
    }
}

/// Copies of the root of a machine that runs, within its pool and to another; answers where the root is then.
pub(super) async fn of_a_root(s: &Subject, spec: &GuestSpec, first: VolumeRef) -> VolumeRef {
    let agent = &s.agent;
    let pool = s.pool().await;
    let guest = GuestRef { instance: spec.instance, generation: spec.generation };
    let m = Machine { s, guest };
    let size = ByteSize::gib(10);

    // What cannot be leaves nothing.
    let second = m.volume(pool, size).await;
    let larger = m.volume(pool, ByteSize(size.bytes() + (1 << 20))).await;
    let e = refused(m.begin(first, larger, 0).await, ErrorKind::Invalid);
    assert_eq!(e.field.as_deref(), Some("to"), "{e:?}");
    let nowhere = VolumeRef { pool, volume: VolumeId(s.env.uuid()) };
    refused(m.begin(first, nowhere, 0).await, ErrorKind::NotFound);
    refused(m.begin(larger, second, 0).await, ErrorKind::NotFound);
    refused(m.begin(first, second, u64::MAX).await, ErrorKind::Invalid);
    refused(m.speed(second, 1).await, ErrorKind::Conflict);
    refused(m.end(first, second, DiskCopyEnd::Pivot).await, ErrorKind::Conflict);
    m.end(first, second, DiskCopyEnd::Cancel).await.expect("there is none");
    let nobody = MachineCopyRef { instance: InstanceId(s.env.uuid()), to: second.volume };
    assert_eq!(agent.machine_copy_state(&s.read(), nobody).await.unwrap().phase, DiskCopyPhase::Gone);
    for at in [second, larger] {
        assert_eq!(m.state(at).await.phase, DiskCopyPhase::Gone);
    }
    m.delete(larger).await.expect("nothing has it");

    // A slow one, that is cancelled; until then both volumes are in use.
    m.begin(first, second, 1 << 20).await.unwrap();
    m.begin(first, second, 1 << 20).await.expect("twice is once");
    let state = m.state(second).await;
    assert!(state.phase == DiskCopyPhase::Copying && state.speed == 1 << 20, "{state:?}");
    let other = m.volume(pool, size).await;
    refused(m.begin(first, other, 0).await, ErrorKind::Conflict);
    m.delete(other).await.unwrap();
    refused(m.end(first, second, DiskCopyEnd::Pivot).await, ErrorKind::Conflict);
    refused(m.delete(second).await, ErrorKind::Conflict);
    let resize = VolumeResize { volume: first, size: ByteSize(size.bytes() + (1 << 20)) };
    refused(agent.volume_resize(&s.change(), resize).await, ErrorKind::Conflict);
    for _ in 0..2 {
        m.end(first, second, DiskCopyEnd::Cancel).await.unwrap();
    }
    assert_eq!(m.state(second).await.phase, DiskCopyPhase::Gone);

    // One that is left as the disk was.
    m.begin(first, second, 0).await.unwrap();
    m.until_ready(second).await;
    m.speed(second, 1 << 30).await.unwrap();
    m.end(first, second, DiskCopyEnd::Finish).await.unwrap();
    refused(m.delete(first).await, ErrorKind::Conflict);
    m.delete(second).await.expect("it is nobody's any more");

    // And one that the machine goes on from.
    let third = m.volume(pool, size).await;
    m.begin(first, third, 0).await.unwrap();
    m.until_ready(third).await;
    for _ in 0..2 {
        m.end(first, third, DiskCopyEnd::Pivot).await.unwrap();
    }
    assert_eq!(m.state(third).await.phase, DiskCopyPhase::Pivoted);
    refused(m.end(first, third, DiskCopyEnd::Cancel).await, ErrorKind::Conflict);
    refused(m.delete(third).await, ErrorKind::Conflict);
    let now = agent.guest_observe_all(&s.read(), ()).await.unwrap();
    let now = now.into_iter().find(|o| o.instance == guest.instance).unwrap();
    assert_eq!(now.state, RuntimeState::Running);
    // What it has left holds nothing back: its snapshots go with it.
    agent.volume_snapshot_create(&s.change(), s.snapshot(first)).await.expect("nothing runs from it");
    m.delete(first).await.unwrap();
    third
}

/// After its end it is known that a machine went on from a copy, until it is started again.
pub(super) async fn after_the_end(s: &Subject, instance: InstanceId, root: VolumeRef, started: bool) {
    let copy = MachineCopyRef { instance, to: root.volume };
    let phase = s.agent.machine_copy_state(&s.read(), copy).await.unwrap().phase;
    assert_eq!(phase, if started { DiskCopyPhase::Gone } else { DiskCopyPhase::Pivoted });
}

/// A machine that ends while its disk is copied has its disk.
pub(super) async fn broken_off(s: &Subject, spec: &GuestSpec, root: VolumeRef) {
    let guest = GuestRef { instance: spec.instance, generation: spec.generation };
    let m = Machine { s, guest };
    let to = m.volume(root.pool, ByteSize::gib(10)).await;
    m.begin(root, to, 1 << 20).await.unwrap();
    let stop = GuestStop { guest, mode: StopMode::Force };
    s.agent.guest_stop(&s.change(), stop).await.unwrap();
    assert_eq!(m.state(to).await.phase, DiskCopyPhase::Gone);
    refused(m.end(root, to, DiskCopyEnd::Pivot).await, ErrorKind::Conflict);
    m.end(root, to, DiskCopyEnd::Cancel).await.unwrap();
    m.delete(to).await.unwrap();
}
