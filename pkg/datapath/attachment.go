package datapath

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/sluice-mesh/sluice/pkg/failpoint"
	"github.com/sluice-mesh/sluice/pkg/netns"
)

// AttachmentID names one interface of one container in one network: what a
// runtime's ADD makes and its DEL removes.
type AttachmentID struct {
	Network, Container, Interface string
}

// Attachment is what is recorded of one.
type Attachment struct {
	AttachmentID        // cut where a name is very long
	Cookie       uint64 // of the namespace it is about
	Provisional  bool   // decided without the daemon, which is to judge again
}

func (a AttachmentID) key() connectAttachmentKey {
	key := connectAttachmentKey{Network: networkHash(a.Network)}
	digest := sha256.Sum256([]byte(a.Container + "\x00" + a.Interface))
	copy(key.Interface[:], digest[:])
	return key
}

func networkHash(name string) uint64 {
	digest := sha256.Sum256([]byte(name))
	return binary.LittleEndian.Uint64(digest[:8])
}

// Attach records an attachment, or records it anew.
func (d *Datapath) Attach(a Attachment) error {
	unlock, err := d.lock()
	if err != nil {
		return err
	}
	defer unlock()
	value := connectAttachment{Cookie: a.Cookie}
	if a.Provisional {
		value.Flags |= connectAttachmentFlagsATTACHMENT_PROVISIONAL
	}
	setText(value.Network[:], a.Network)
	setText(value.Container[:], a.Container)
	setText(value.Interface[:], a.Interface)
	if err := d.maps["attachments"].Put(a.key(), value); err != nil {
		return tableError("attachments", err)
	}
	failpoint.Step("attachment written")
	return nil
}

// Released says what became of an attachment.
type Released struct {
	Attachment
	Unenrolled bool // it was the last about its namespace
}

// Release forgets an attachment, and un-enrols its namespace with the last one.
// ns may be nil; if it is not the namespace in question, it is left alone. What
// is not recorded is no error: found is false.
func (d *Datapath) Release(a AttachmentID, ns *netns.NetNS) (out Released, found bool, err error) {
	unlock, err := d.lock()
	if err != nil {
		return Released{}, false, err
	}
	defer unlock()
	var value connectAttachment
	if err := d.maps["attachments"].Lookup(a.key(), &value); errors.Is(err, ebpf.ErrKeyNotExist) {
		return Released{}, false, nil
	} else if err != nil {
		return Released{}, false, fmt.Errorf("read attachments: %w", err)
	}
	out, err = d.release(a.key(), value, ns)
	return out, true, err
}

// ReleaseStale releases every attachment of a network but the valid ones, and lists
// what it has released.
func (d *Datapath) ReleaseStale(network string, valid []AttachmentID) ([]Released, error) {
	unlock, err := d.lock()
	if err != nil {
		return nil, err
	}
	defer unlock()
	keep := map[connectAttachmentKey]bool{}
	for _, a := range valid {
		a.Network = network
		keep[a.key()] = true
	}
	stale := map[connectAttachmentKey]connectAttachment{}
	err = each(d.maps["attachments"], func(k connectAttachmentKey, v connectAttachment) {
		if k.Network == networkHash(network) && !keep[k] {
			stale[k] = v
		}
	})
	var out []Released
	for key, value := range stale {
		r, e := d.release(key, value, nil)
		if e != nil {
			err = errors.Join(err, e)
			continue
		}
		out = append(out, r)
	}
	return out, err
}

// release un-enrols before it forgets: if that fails, or is cut off between the two,
// a second DEL finds the record.
func (d *Datapath) release(key connectAttachmentKey, value connectAttachment, ns *netns.NetNS) (Released, error) {
	out := Released{Attachment: attachmentOf(value)}
	others := false
	err := each(d.maps["attachments"], func(k connectAttachmentKey, v connectAttachment) {
		others = others || k != key && v.Cookie == value.Cookie
	})
	if err == nil && !others {
		if ns == nil || ns.Cookie() != value.Cookie {
			// GC names no namespace, and DEL may name one that is gone.
			if ns = d.find(value.Cookie); ns != nil {
				defer ns.Close()
			}
		}
		out.Unenrolled = true
		err = d.unenroll(value.Cookie, ns)
	}
	if err != nil {
		return out, err
	}
	err = deleteKey(d.maps["attachments"], key)
	failpoint.Step("release: forgotten")
	return out, err
}

// Attachment finds what is recorded of an attachment.
func (d *Datapath) Attachment(a AttachmentID) (out Attachment, found bool, err error) {
	var value connectAttachment
	if err := d.maps["attachments"].Lookup(a.key(), &value); errors.Is(err, ebpf.ErrKeyNotExist) {
		return Attachment{}, false, nil
	} else if err != nil {
		return Attachment{}, false, fmt.Errorf("read attachments: %w", err)
	}
	return attachmentOf(value), true, nil
}

// Attachments lists what is recorded.
func (d *Datapath) Attachments() ([]Attachment, error) {
	var out []Attachment
	err := each(d.maps["attachments"], func(_ connectAttachmentKey, v connectAttachment) {
		out = append(out, attachmentOf(v))
	})
	return out, err
}

func attachmentOf(v connectAttachment) Attachment {
	return Attachment{
		AttachmentID: AttachmentID{text(v.Network[:]), text(v.Container[:]), text(v.Interface[:])},
		Cookie:       v.Cookie,
		Provisional:  v.Flags&connectAttachmentFlagsATTACHMENT_PROVISIONAL != 0,
	}
}
