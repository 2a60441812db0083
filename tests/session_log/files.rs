//! The log as a file in a folder: who may have it, and what becomes of it when its place is gone.

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;

use lmserve::engine::LogFile;

use super::*;

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let unique = format!("lmserve-{name}-{}", std::process::id());
        Self(std::env::temp_dir().join(unique))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

#[test]
fn a_folder_is_one_servers_and_its_files_are_its_owners() {
    let folder = Folder::new("log-lock");
    let path = folder.0.join("below");
    let mut server = Server::open(LogFile::open(&path).unwrap(), options(&[(0, 0)])).unwrap();
    assert_eq!(LogFile::open(&path).unwrap_err().code, "session_dir_in_use");
    server.turn(key(0, 1), Start::Create, &[1, 2, 3], false);
    let expected = server.states();
    drop(server);
    std::fs::write(path.join("sessions.log.new"), "left by a server that died").unwrap();
    let server = Server::open(LogFile::open(&path).unwrap(), options(&[(0, 0)])).unwrap();
    assert_eq!(server.states(), expected);
    assert!(!path.join("sessions.log.new").exists());
    for name in ["", "sessions.log", "lock"] {
        let mode = std::fs::metadata(path.join(name))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o077, 0, "{name}");
    }
}

#[test]
fn a_log_that_was_left_suspect_is_written_anew() {
    let folder = Folder::new("log-suspect");
    let open = || Server::open(LogFile::open(&folder.0).unwrap(), options(&[(0, 0)])).unwrap();
    let mut server = open();
    server.turn(key(0, 1), Start::Create, &[1, 2, 3], false);
    let expected = server.states();
    let mut file = server.log.into_storage();
    let inode = || {
        std::fs::metadata(folder.0.join("sessions.log"))
            .unwrap()
            .ino()
    };
    let before = inode();
    file.mark_suspect(true).unwrap();
    file.mark_suspect(true).unwrap();
    drop(file);
    let server = open();
    assert_eq!(server.states(), expected);
    assert!(server.log.fault().is_none());
    assert_ne!(inode(), before);
    drop(server);
    let before = inode();
    drop(open());
    assert_eq!(inode(), before, "once is enough");
}

#[test]
fn a_file_is_rewritten_in_place() {
    let folder = Folder::new("log-rewrite");
    let mut server = Server::open(LogFile::open(&folder.0).unwrap(), options(&[(0, 0)])).unwrap();
    for _ in 0..50 {
        server.turn(key(0, 1), Start::Fresh, &[1; 100], false);
    }
    server.log.begin_rewrite().unwrap();
    let store = Arc::clone(&server.store);
    while server.log.is_rewriting() {
        let next = |last| store.lock().unwrap().states_after(last, 8);
        server.log.rewrite_some(next, Vec::new).unwrap();
    }
    server.turn(key(0, 1), Start::Create, &[2, 3], false);
    let size = std::fs::metadata(folder.0.join("sessions.log"))
        .unwrap()
        .len();
    assert_eq!(size, server.log.len());
    assert!(size < 1000, "{size} bytes");
    let expected = server.states();
    drop(server);
    let server = Server::open(LogFile::open(&folder.0).unwrap(), options(&[(0, 0)])).unwrap();
    assert_eq!(server.states(), expected);
    assert_eq!(server.restored.torn, 0);
}

#[test]
fn a_lock_that_is_about_to_be_left_is_waited_for() {
    let folder = Folder::new("log-left");
    let held = LogFile::open(&folder.0).unwrap();
    let (opening, begun) = std::sync::mpsc::channel();
    let other = std::thread::spawn(move || {
        begun.recv().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        drop(held);
    });
    opening.send(()).unwrap();
    LogFile::open(&folder.0).unwrap();
    other.join().unwrap();
}

#[test]
fn a_folder_that_cannot_be_is_refused() {
    let folder = Folder::new("log-unusable");
    std::fs::write(&folder.0, "a file").unwrap();
    let error = LogFile::open(&folder.0).unwrap_err();
    assert_eq!(error.code, "session_dir_unusable");
    assert!(error.message.contains(folder.0.to_str().unwrap()));
    std::fs::remove_file(&folder.0).unwrap();
}

#[test]
fn a_torn_end_is_cut_off_and_kept_beside() {
    let folder = Folder::new("log-torn");
    let mut server = Server::open(LogFile::open(&folder.0).unwrap(), options(&[(0, 0)])).unwrap();
    server.turn(key(0, 1), Start::Create, &[1, 2, 3], false);
    let expected = server.states();
    drop(server);
    let path = folder.0.join("sessions.log");
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, [&whole[..], b"half a rec"].concat()).unwrap();
    let server = Server::open(LogFile::open(&folder.0).unwrap(), options(&[(0, 0)])).unwrap();
    assert_eq!(server.states(), expected);
    assert_eq!(std::fs::read(&path).unwrap(), whole);
    let kept = folder.0.join(server.restored.kept.clone().unwrap());
    assert_eq!(std::fs::read(&kept).unwrap(), b"half a rec");
    let mode = std::fs::metadata(&kept).unwrap().permissions().mode();
    assert_eq!(mode & 0o077, 0);
}

#[test]
fn what_is_no_file_in_the_logs_place_is_refused_at_once() {
    let folder = Folder::new("log-fifo");
    std::fs::create_dir(&folder.0).unwrap();
    for name in ["sessions.log", "lock"] {
        let path = folder.0.join(name);
        drop(std::fs::remove_file(&path));
        let fifo = std::process::Command::new("mkfifo").arg(&path).status();
        assert!(fifo.unwrap().success());
        let error = LogFile::open(&folder.0).unwrap_err();
        assert_eq!(error.code, "session_dir_unusable");
        assert!(error.message.contains("is a FIFO"), "{error}");
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        let error = LogFile::open(&folder.0).unwrap_err();
        assert!(error.message.contains("is a folder"), "{error}");
        std::fs::remove_dir(&path).unwrap();
    }
}

#[test]
fn a_log_whose_place_is_gone_takes_nothing_until_it_is_made_again() {
    let folder = Folder::new("log-gone");
    let mut server = Server::open(LogFile::open(&folder.0).unwrap(), options(&[(0, 0)])).unwrap();
    server.turn(key(0, 1), Start::Create, &[1, 2, 3], false);
    let path = folder.0.join("sessions.log");
    std::fs::remove_dir_all(&folder.0).unwrap();
    let error = server.log.append(&[Change::Evict(&key(0, 9))], false);
    let error = error.unwrap_err();
    assert_eq!((error.kind.status(), error.code), (503, "storage_failed"));
    assert!(error.message.contains("was deleted"), "{error}");
    assert!(server.log.is_suspect());
    let store = Arc::clone(&server.store);
    let next = |last, limit| store.lock().unwrap().states_after(last, limit);
    server.log.rewrite_all(next, Vec::new).unwrap();
    assert!(!server.log.is_suspect());
    server.turn(key(0, 1), Start::Create, &[4, 5], false);
    let expected = server.states();

    // Something else in its place is left alone, and the server's folder is still its own.
    assert_eq!(
        LogFile::open(&folder.0).unwrap_err().code,
        "session_dir_in_use"
    );
    std::fs::rename(&path, folder.0.join("aside")).unwrap();
    std::fs::write(&path, "another's").unwrap();
    let error = server.log.append(&[], true).unwrap_err();
    assert!(error.message.contains("is another file now"), "{error}");
    let next = |last, limit| store.lock().unwrap().states_after(last, limit);
    server.log.rewrite_all(next, Vec::new).unwrap_err();
    assert_eq!(std::fs::read(&path).unwrap(), b"another's");
    drop(server);
    std::fs::rename(folder.0.join("aside"), &path).unwrap();
    let server = Server::open(LogFile::open(&folder.0).unwrap(), options(&[(0, 0)])).unwrap();
    assert_eq!(server.states(), expected);
}
