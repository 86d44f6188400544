//! Memory of a virtual machine in files of its host: dumped, saved, broken off, and gone on from.

use super::*;
use karst_model::{
    MemoryJobId,
    guest::StopMode,
    instance::RuntimeState,
    memory::{DumpFormat, MemoryEnd, MemoryPhase},
};

/// A machine that runs, and where its memory may be written.
struct Machine<'a> {
    s: &'a Subject,
    guest: GuestRef,
    saves: &'a str,
}

impl Machine<'_> {
    fn path(&self, name: &str) -> String {
        format!("{}/{name}", self.saves)
    }

    async fn begin(&self, id: MemoryJobId, path: &str, wish: MemoryWish) -> Result<()> {
        let request = MachineMemoryBegin { guest: self.guest, id, path: path.into(), wish };
        self.s.agent.machine_memory_begin(&self.s.change(), request).await
    }

    fn at(&self, id: MemoryJobId) -> MachineMemoryRef {
        MachineMemoryRef { instance: self.guest.instance, id: Some(id) }
    }

    async fn phase(&self, id: MemoryJobId) -> MemoryPhase {
        self.s.agent.machine_memory_state(&self.s.read(), self.at(id)).await.unwrap().phase
    }

    async fn until_done(&self, id: MemoryJobId) {
        let limit = self.s.boot.max(Duration::from_secs(120));
        self.s
            .until("the memory", limit, async || match self.phase(id).await {
                MemoryPhase::Done => Some(()),
                MemoryPhase::Running => None,
                other => panic!("{other:?}"),
            })
            .await;
    }

    async fn end(&self, id: MemoryJobId, end: MemoryEnd) -> Result<()> {
        self.s.agent.machine_memory_end(&self.s.change(), MachineMemoryEnd { memory: self.at(id), end }).await
    }

    async fn state(&self) -> RuntimeState {
        let all = self.s.agent.guest_observe_all(&self.s.read(), ()).await.unwrap();
        all.iter().find(|o| o.instance == self.guest.instance).unwrap().state
    }

    async fn stop(&self) {
        let stop = GuestStop { guest: self.guest, mode: StopMode::Force };
        self.s.agent.guest_stop(&self.s.change(), stop).await.unwrap();
    }
}

fn dump() -> MemoryWish {
    MemoryWish::Dump { format: DumpFormat::Elf }
}

fn save(document: &str) -> MemoryWish {
    MemoryWish::Save { document: document.into(), paused: false }
}

/// Dumps of a machine that runs, and what is refused.
pub(super) async fn of_a_machine(s: &Subject, spec: &GuestSpec) {
    let Some(saves) = &s.saves else { return eprintln!("contract: memory in files: skipped") };
    let guest = GuestRef { instance: spec.instance, generation: spec.generation };
    let m = Machine { s, guest, saves };
    let id = || MemoryJobId(s.env.uuid());
    let (first, path) = (id(), m.path("a.dump"));

    // What cannot be leaves nothing.
    for wrong in ["", "a", "/", &m.path("../a"), &m.path("b/"), &format!("{path}\0")] {
        let e = refused(m.begin(id(), wrong, dump()).await, ErrorKind::Invalid);
        assert_eq!(e.field.as_deref(), Some("path"), "{wrong:?}");
    }
    for not in ["/etc/passwd", "/srv-not-granted/a"] {
        let e = refused(m.begin(id(), not, dump()).await, ErrorKind::Forbidden);
        assert!(e.message.contains("save_paths"), "{e}");
        refused(s.agent.memory_file_read(&s.read(), not.into()).await, ErrorKind::Forbidden);
    }
    refused(s.agent.memory_file_read(&s.read(), path.clone()).await, ErrorKind::NotFound);
    let nobody = MachineMemoryRef { instance: InstanceId(s.env.uuid()), id: Some(first) };
    let none = s.agent.machine_memory_state(&s.read(), nobody).await.unwrap();
    assert_eq!((none.phase, m.phase(first).await), (MemoryPhase::Gone, MemoryPhase::Gone));
    refused(m.end(first, MemoryEnd::Keep).await, ErrorKind::Conflict);
    m.end(first, MemoryEnd::Cancel).await.expect("there is none");

    m.begin(first, &path, dump()).await.unwrap();
    m.begin(first, &path, dump()).await.expect("twice is once");
    m.until_done(first).await;
    refused(s.agent.memory_file_read(&s.read(), path.clone()).await, ErrorKind::NotFound);
    for _ in 0..2 {
        m.end(first, MemoryEnd::Keep).await.unwrap();
    }
    assert_eq!(m.state().await, RuntimeState::Running, "it goes on");
    refused(s.agent.memory_file_read(&s.read(), path.clone()).await, ErrorKind::Invalid);
    let e = refused(m.begin(id(), &path, dump()).await, ErrorKind::Conflict);
    assert_eq!(e.field.as_deref(), Some("path"), "what is there stays: {e}");
    refused(m.begin(id(), &path, save("x")).await, ErrorKind::Conflict);
    assert_eq!(m.state().await, RuntimeState::Running);
    // One that is cancelled leaves no file.
    let (second, path) = (id(), m.path("b.dump"));
    m.begin(second, &path, dump()).await.unwrap();
    for _ in 0..2 {
        m.end(second, MemoryEnd::Cancel).await.unwrap();
    }
    refused(s.agent.memory_file_read(&s.read(), path).await, ErrorKind::NotFound);
    assert_eq!(m.state().await, RuntimeState::Running);
    // One without a name, twice, and nothing stays of it.
    for _ in 0..2 {
        let request = MachineDump { guest, format: DumpFormat::Elf };
        let limit = CallContext::read(s.boot.max(Duration::from_secs(120)));
        let answer = s.agent.machine_memory_dump(&limit, request).await.unwrap();
        let mut file = File::from(answer.fds.into_iter().next().unwrap());
        let mut magic = [0; 4];
        file.read_exact(&mut magic).unwrap();
        assert_eq!((&magic, file.metadata().unwrap().len()), (b"\x7fELF", answer.value));
        assert_eq!(m.state().await, RuntimeState::Running);
    }
    let nobody = GuestRef { instance: InstanceId(s.env.uuid()), generation: spec.generation };
    let request = MachineDump { guest: nobody, format: DumpFormat::Elf };
    refused(s.agent.machine_memory_dump(&s.read(), request).await, ErrorKind::NotFound);
}

/// A machine is saved: broken off, by its end, whole, over an older one; and goes on from there.
pub(super) async fn over_an_end(s: &Subject, spec: &mut GuestSpec) {
    let Some(saves) = s.saves.clone() else { return };
    // Without what QEMU cannot save.
    spec.machine.as_mut().unwrap().stateful = true;
    let id = || MemoryJobId(s.env.uuid());
    let start = async |spec: &GuestSpec| s.agent.guest_start(&s.change(), spec.clone()).await;
    let machine = |spec: &GuestSpec| Machine {
        s,
        guest: GuestRef { instance: spec.instance, generation: spec.generation },
        saves: &saves,
    };
    start(spec).await.unwrap();
    let m = machine(spec);
    let path = m.path("a.save");
    let read = async || s.agent.memory_file_read(&s.read(), path.clone()).await;

    let first = id();
    m.begin(first, &path, save("first")).await.unwrap();
    assert_eq!(m.state().await, RuntimeState::Paused, "it stands still");
    refused(m.begin(id(), &path, save("other")).await, ErrorKind::Conflict);
    for _ in 0..2 {
        m.end(first, MemoryEnd::Cancel).await.unwrap();
    }
    assert_eq!(m.state().await, RuntimeState::Running, "it goes on");
    refused(read().await, ErrorKind::NotFound);
    // Its end in the middle leaves nothing.
    let second = id();
    m.begin(second, &path, save("second")).await.unwrap();
    m.stop().await;
    assert_eq!(m.phase(second).await, MemoryPhase::Gone);
    refused(m.end(second, MemoryEnd::Keep).await, ErrorKind::Conflict);
    m.end(second, MemoryEnd::Cancel).await.unwrap();
    refused(read().await, ErrorKind::NotFound);

    spec.generation = spec.generation.next();
    start(spec).await.unwrap();
    let m = machine(spec);
    // Kept, and cancelled all the same before the machine has ended: it goes on, and there is no file.
    let third = id();
    m.begin(third, &path, save("third")).await.unwrap();
    m.until_done(third).await;
    m.end(third, MemoryEnd::Keep).await.unwrap();
    m.end(third, MemoryEnd::Cancel).await.unwrap();
    assert_eq!(m.state().await, RuntimeState::Running);
    refused(read().await, ErrorKind::NotFound);
    let fourth = id();
    m.begin(fourth, &path, save("fourth")).await.unwrap();
    m.until_done(fourth).await;
    for _ in 0..2 {
        m.end(fourth, MemoryEnd::Keep).await.unwrap();
    }
    m.stop().await;
    m.end(fourth, MemoryEnd::Cancel).await.expect("what has ended is in the file alone");
    let saved = read().await.unwrap();
    let uuid = spec.machine.as_ref().unwrap().uuid;
    assert_eq!((saved.document.as_str(), saved.uuid, saved.paused), ("fourth", uuid, false));

    let change = |uuid, document: &str| MemoryFileChange {
        path: path.clone(),
        uuid,
        document: document.into(),
        paused: true,
    };
    refused(s.agent.memory_file_change(&s.change(), change(s.env.uuid(), "x")).await, ErrorKind::Conflict);
    for _ in 0..2 {
        s.agent.memory_file_change(&s.change(), change(uuid, "changed")).await.unwrap();
    }
    let long = "x".repeat(karst_model::memory::DOCUMENT + 1);
    refused(s.agent.memory_file_change(&s.change(), change(uuid, &long)).await, ErrorKind::TooLarge);
    let saved = read().await.unwrap();
    assert_eq!((saved.document.as_str(), saved.paused), ("changed", true));

    // On it goes, twice if that is wanted, and not another machine.
    let mut from = spec.clone();
    from.memory = Some(path.clone());
    from.machine.as_mut().unwrap().resume = true;
    for wrong in [m.path("none"), "/etc/passwd".into()] {
        from.generation = from.generation.next();
        assert!(start(&GuestSpec { memory: Some(wrong), ..from.clone() }).await.is_err());
    }
    let mut other = from.clone();
    other.machine.as_mut().unwrap().uuid = s.env.uuid();
    refused(start(&other).await, ErrorKind::Conflict);
    let mut larger = from.clone();
    larger.limits.memory = Some(ByteSize::mib(640));
    refused(start(&larger).await, ErrorKind::Conflict);
    for paused in [false, true] {
        from.generation = from.generation.next();
        from.machine.as_mut().unwrap().paused = paused;
        start(&from).await.unwrap();
        start(&from).await.expect("twice is once");
        let m = machine(&from);
        let wanted = if paused { RuntimeState::Paused } else { RuntimeState::Running };
        assert_eq!(m.state().await, wanted);
        m.stop().await;
        assert_eq!(read().await.unwrap().document, "changed", "the file stays");
    }
    // Over the older one.
    spec.generation = from.generation.next();
    start(spec).await.unwrap();
    let m = machine(spec);
    let last = id();
    m.begin(last, &path, save("last")).await.unwrap();
    assert_eq!(read().await.unwrap().document, "changed", "until it is whole");
    m.until_done(last).await;
    m.end(last, MemoryEnd::Keep).await.unwrap();
    assert_eq!(read().await.unwrap().document, "last");
    m.stop().await;
    spec.machine.as_mut().unwrap().stateful = false;
}
